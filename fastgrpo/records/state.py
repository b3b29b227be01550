"""How a run stands, read from what is in its directory: running, finished, stopped or failed.

Nothing here waits for torch: a table of many runs is to appear at once.
"""

import fcntl
import json
import math
import os
import statistics
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RUNNING, FINISHED, STOPPED, FAILED = "running", "finished", "stopped", "failed"
# struct flock of 64-bit Linux: kind, whence, start, length, process
_FLOCK = "hhqqi"


def reached(config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """FINISHED where the rows of metrics.jsonl end where the config says that training ends, else STOPPED."""
    training = config.get("train") or {}
    last = rows[-1] if rows else {}
    seconds = last.get("seconds") or 0.0
    is_over = last.get("iteration", 0) >= _number(training.get("iterations"))
    return FINISHED if is_over or seconds >= 60 * _number(training.get("max_minutes")) else STOPPED


def state_of(directory: Path, config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    """The state of a run, and what made it fail if that is known.  Call it from another process than the run's.

    A run that was killed left no word of it, and counts as stopped.
    """
    if is_locked(directory / ".lock"):
        return RUNNING, None
    try:
        summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
        error = summary.get("error")
    except (OSError, ValueError, AttributeError):
        error = None
    if error:
        return FAILED, str(error)
    if batches := sorted(directory.glob("failed_batch*.safetensors")):
        newest = max(path.stat().st_mtime for path in batches)
        metrics = directory / "metrics.jsonl"
        # one that is older is of an attempt from which the run has gone on
        if not metrics.exists() or newest >= metrics.stat().st_mtime:
            return FAILED, f"its samples are in {batches[0]}"
    return reached(config, rows), None


def median_speed(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Images a second in the median of the iterations that compiled nothing, but for the first; None if there is none.

    Where there are no others, of all.
    """
    speeds = [(row["images_per_second"], is_warm(row)) for row in rows if row.get("images_per_second") is not None]
    warm = [speed for speed, counts in speeds if counts] or [speed for speed, _ in speeds]
    return statistics.median(warm) if warm else None


def is_warm(row: Mapping[str, Any]) -> bool:
    """Whether an iteration is as fast as those to come: it compiled nothing, and it is not the first."""
    return not row.get("compilations") and row.get("iteration", 0) > 1


def is_locked(path: Path) -> bool:
    """Whether another process holds a lock on the file, also one on another machine if the file system tells.

    Only asked, not taken: a run that starts at this moment is not disturbed.
    """
    if not path.exists():
        return False
    asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        with open(path, "rb") as file:
            kind, *_ = struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))
    except OSError:
        return False
    return bool(kind != fcntl.F_UNLCK)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.inf
