"""A directory that only its user can enter: caches whose contents are trusted are read from there alone."""

import os
import stat
from pathlib import Path


def make_private(directory: Path, key: str) -> None:
    """Make ``directory`` if need be; ValueError, naming the config key that chose it, if others have access to it."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{directory} cannot be made ({error.strerror}); set {key} to a directory of your own"
        ) from error
    check_own(directory, key)
    mode = stat.S_IMODE(directory.stat().st_mode)
    if mode & 0o077:
        raise ValueError(
            f"{directory} has mode {mode:o}: others have access to it, and what is in it is trusted; "
            f"run chmod 700 {directory} if its contents are yours, or set {key}"
        )


def check_own(path: Path, key: str) -> None:
    """ValueError if ``path`` is a link, or belongs to somebody else."""
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        raise ValueError(
            f"{path} is a link to {path.readlink()}; only the cache itself is read: delete the link, or set {key} to "
            "the place that it leads to"
        )
    if status.st_uid != os.geteuid():
        raise ValueError(
            f"{path} belongs to user {status.st_uid}, not to you ({os.geteuid()}); delete it, or set {key} to a "
            "directory of your own"
        )
