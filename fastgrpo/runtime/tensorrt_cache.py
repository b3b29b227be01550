"""Engines on disk: a directory that only its user can enter, in which a file's name says all that it depends on.

    key = SHA-256 of {weights, graph, inputs, precision, profile, builder, device, versions}

An engine is code that the GPU will run, so it is read only from a directory that nobody else can write to, and only if
it is byte for byte what was written (``fastgrpo.runtime.sealed``); anything else is built again.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fastgrpo.runtime.sealed import read_sealed, write_sealed

_log = logging.getLogger(__name__)
_PLAN, _FACTS = "engine.plan", "facts.json"


def cache_key(facts: Mapping[str, object]) -> str:
    """The name of the engine that ``facts``, anything that JSON can hold, describe completely."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class EngineCache:
    """The engines in ``directory``, which is made if need be; ValueError for one that others have access to."""

    directory: Path

    def __post_init__(self) -> None:
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"{self.directory} cannot be made ({error.strerror}); set reward_backend.directory to a directory of "
                "your own"
            ) from error
        self._check(self.directory)
        mode = stat.S_IMODE(self.directory.stat().st_mode)
        if mode & 0o077:
            raise ValueError(
                f"{self.directory} has mode {mode:o}: others have access to it, and engines are code; "
                f"run chmod 700 {self.directory} if its contents are yours, or set reward_backend.directory"
            )

    @contextmanager
    def locked(self, key: str) -> Iterator[None]:
        """One process at a time: the others wait, and then find the engine there."""
        path = self.directory / f"{key}.lock"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _log.info("waiting for another process that builds this engine (%s)", path)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def read(self, key: str) -> bytes | None:
        """The engine, or None if there is none or it is damaged; ValueError if it may be another's."""
        path = self.directory / key
        if not path.exists() and not path.is_symlink():
            return None
        for inner in (path, *path.iterdir()):
            self._check(inner)
        try:
            return read_sealed(path, (_PLAN, _FACTS))[_PLAN]
        except ValueError as error:
            _log.warning("%s; the engine is built again", error)
            return None

    def write(self, key: str, plan: bytes, facts: Mapping[str, object]) -> None:
        """Keep the engine, and beside it in plain text the facts that its key is made of."""
        text = json.dumps(facts, indent=1, sort_keys=True) + "\n"
        write_sealed(
            self.directory / key,
            {
                _PLAN: lambda path: path.write_bytes(plan),
                _FACTS: lambda path: path.write_text(text, encoding="utf-8"),
            },
        )

    def remove(self, key: str) -> None:
        """Forget the engine, if there is one."""
        shutil.rmtree(self.directory / key, ignore_errors=True)

    def _check(self, path: Path) -> None:
        """ValueError if ``path`` is a link, or belongs to somebody else."""
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            raise ValueError(
                f"{path} is a link to {path.readlink()}; engines are read from the cache itself: delete the link, or "
                "set reward_backend.directory to the place that it leads to"
            )
        if status.st_uid != os.geteuid():
            raise ValueError(
                f"{path} belongs to user {status.st_uid}, not to you ({os.geteuid()}); delete it, or set "
                "reward_backend.directory to a directory of your own"
            )
