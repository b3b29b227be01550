"""One step in a process group of its own, which its limit ends: what crashes or hangs costs that step alone."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMPLETE, FAILED, TIMED_OUT = "complete", "failed", "timed out"
# between being asked to end and being ended
_GRACE_SECONDS = 5


@dataclass(frozen=True)
class Outcome:
    """How a process went; ``reason`` is empty for one that did what it should.

    ``cpu_seconds`` are of all its processes: beside ``seconds`` they say how much was compiling and launching.
    """

    status: str
    reason: str
    seconds: float
    cpu_seconds: float


def run(
    arguments: Sequence[str], *, seconds: float, log: Path, directory: Path, environment: Mapping[str, str]
) -> Outcome:
    """Run python with ``arguments`` in ``directory`` for at most ``seconds``, its output in the file ``log``."""
    start, cpu = time.monotonic(), _cpu_seconds()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=directory,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # a session of its own would outlive a command that a lent machine ends
            process_group=0,
        )
        try:
            code = process.wait(seconds)
            status, reason = (COMPLETE, "") if code == 0 else (FAILED, _ending(code))
        except subprocess.TimeoutExpired:
            status, reason = TIMED_OUT, f"not done after its limit of {seconds:.0f} s"
        finally:
            # also of a process that has ended: what it started may live on, and hold the GPU
            end_group(process)
    return Outcome(status, reason, time.monotonic() - start, _cpu_seconds() - cpu)


def _cpu_seconds() -> float:
    """Of all processes that this one has seen end."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _ending(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def end_group(process: subprocess.Popen[Any], grace_seconds: float = _GRACE_SECONDS) -> None:
    """Ask the whole group, which has the number of its first process, to end, then end it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(grace_seconds)
        except subprocess.TimeoutExpired:
            continue
        time.sleep(0.1)
    process.wait()
