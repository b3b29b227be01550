"""Where a command writes: a directory that is new or empty, so that nothing is ever overwritten."""

import tempfile
from itertools import count
from pathlib import Path

# where commands write that are not told where: these are numbered, as evaluation_2
_DEFAULTS = ("outputs/evaluation", "outputs/samples", "outputs/export")


def new_directory(path: str) -> Path:
    """Make the directory, for a default one the first of its numbers that is free.

    ValueError if something is in it or it cannot be written.
    """
    directory = Path(path).expanduser()
    try:
        if path in _DEFAULTS:
            directory = _numbered(directory)
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()):
            raise ValueError(f"{directory} is not empty; give output= a new directory")
        # permissions say yes to root and to full disks: only writing tells
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"x")
    except OSError as error:
        raise ValueError(f"cannot write {directory} ({error.strerror}); give output= another one") from error
    return directory


def _numbered(directory: Path) -> Path:
    """The directory if it is new or empty, else the first of its numbers that is."""
    for number in count(1):
        path = directory if number == 1 else directory.with_name(f"{directory.name}_{number}")
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            return path
    raise AssertionError("numbers have no end")
