"""Engines on disk: a directory that only its user can enter, in which a file's name says all that it depends on.

    key = SHA-256 of {weights, graph, inputs, precision, profile, builder, device, versions}

An engine is code that the GPU will run, so it is read only from a directory that nobody else can write to, and only if
it is byte for byte what was written (``fastgrpo.files.sealed``); anything else is built again.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fastgrpo.files.private_directory import check_own, make_private
from fastgrpo.files.sealed import read_sealed, write_sealed

_log = logging.getLogger(__name__)
_PLAN, _FACTS = "engine.plan", "facts.json"
_KEY = "reward_backend.directory"


def cache_key(facts: Mapping[str, object]) -> str:
    """The name of the engine that ``facts``, anything that JSON can hold, describe completely."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class EngineCache:
    """The engines in ``directory``, which is made if need be; ValueError for one that others have access to."""

    directory: Path

    def __post_init__(self) -> None:
        make_private(self.directory, _KEY)

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
            check_own(inner, _KEY)
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
