"""Processes of others, watched from a test."""

import time
from collections.abc import Callable
from pathlib import Path


def lives(pid: int) -> bool:
    """Whether the process computes; one that has ended may wait to be noticed."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    """Until it does; AssertionError if that takes longer."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)
