"""A file of JSON objects, one an iteration, that a killed run may leave half written and a resumed run goes on with."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)


def append_row(path: Path, row: dict[str, Any]) -> None:
    """On disk when this returns, as far as a kill of the process goes; ValueError where it cannot be written."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
    except OSError as error:
        raise ValueError(f"cannot write {path} ({error.strerror}); free space, then resume") from error


def read_rows(path: Path, *, is_growing: bool = False) -> list[dict[str, Any]]:
    """The rows up to the first line that is not whole; none of a file that is not there.

    is_growing: another process may be writing the last line, which then is nothing to warn of.
    """
    return [row for row, _ in _rows(path, is_growing)] if path.exists() else []


def truncate_rows(path: Path, iteration: int) -> None:
    """Drop the rows of later iterations, and the last one if a kill left half of it."""
    if not path.exists():
        return
    size = 0
    for row, end in _rows(path):
        if row["iteration"] > iteration:
            break
        size = end
    with open(path, "r+b") as file:
        file.truncate(size)


def _rows(path: Path, is_growing: bool = False) -> Iterator[tuple[dict[str, Any], int]]:
    """Each row and the offset of its end in bytes, up to the first line that is not whole."""
    end = 0
    with open(path, "rb") as file:
        for line in file:
            end += len(line)
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict) or "iteration" not in row or not line.endswith(b"\n"):
                if not is_growing:
                    _log.warning("%s: line ending at byte %d is not whole, it and what follows is dropped", path, end)
                return
            yield row, end
