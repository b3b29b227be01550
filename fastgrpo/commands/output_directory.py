"""Where a command writes: a directory that is new or empty, so that nothing is ever overwritten."""

import tempfile
from pathlib import Path


def new_directory(path: str) -> Path:
    """Make the directory; ValueError if something is in it or it cannot be written."""
    directory = Path(path).expanduser()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()):
            raise ValueError(f"{directory} is not empty; give output= a new directory")
        # permissions say yes to root and to full disks: only writing tells
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"x")
    except OSError as error:
        raise ValueError(f"cannot write {directory} ({error.strerror}); give output= another one") from error
    return directory
