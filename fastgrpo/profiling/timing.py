"""Seconds per stage of an iteration, without a host sync while it runs, and which stage that is for profilers.

Of each stage, how long this rank waited for the others in it is counted apart.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch.profiler import record_function

# before a stage's name in a trace
STAGE = "stage/"
# before the name of the stage that waits for other ranks
WAIT = "wait/"
NO_STAGE = "between stages"
_running = [NO_STAGE]
_timers: list["StageTimer"] = []


class StageTimer:
    """``with timer("rollout"):`` adds to that stage.  On CUDA it records events, which ``seconds`` reads.

    The time of a stage within another is its own alone.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self.thread = threading.get_ident()
        self._spans: list[tuple[str, float | torch.cuda.Event, float | torch.cuda.Event]] = []
        self._within: list[tuple[str, float | torch.cuda.Event, float | torch.cuda.Event]] = []
        self._start = self._now()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Part of the running stage in which other ranks are waited for."""
        start = self._now()
        yield
        self._spans.append((WAIT + running_stage(), start, self._now()))

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = self._now()
        around = running_stage() if self in _timers else NO_STAGE
        _running.append(stage)
        _timers.append(self)
        try:
            with record_function(STAGE + stage):
                yield
        finally:
            _running.pop()
            _timers.pop()
        end = self._now()
        self._spans.append((stage, start, end))
        if around != NO_STAGE:
            self._within.append((around, start, end))

    def seconds(self) -> dict[str, float]:
        """Seconds of each stage, of waiting in it, and of everything since the timer was made under ``iteration``."""
        end = self._now()
        if self._is_cuda:
            torch.cuda.synchronize()
        totals = {"iteration": self._between(self._start, end)}
        for stage, first, last in self._spans:
            totals[stage] = totals.get(stage, 0.0) + self._between(first, last)
        for stage, first, last in self._within:
            totals[stage] -= self._between(first, last)
        return totals

    def _now(self) -> float | torch.cuda.Event:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @staticmethod
    def _between(first: float | torch.cuda.Event, last: float | torch.cuda.Event) -> float:
        if isinstance(first, torch.cuda.Event) and isinstance(last, torch.cuda.Event):
            return first.elapsed_time(last) / 1000
        assert isinstance(first, float)
        assert isinstance(last, float)
        return last - first


def waiting() -> AbstractContextManager[None]:
    """``StageTimer.waiting`` of the stage that this thread is in, if it is in one."""
    return _timers[-1].waiting() if _timers and _timers[-1].thread == threading.get_ident() else nullcontext()


def inner_stage(name: str) -> AbstractContextManager[None]:
    """A stage within the one that this thread is in, if it is in one."""
    return _timers[-1](name) if _timers and _timers[-1].thread == threading.get_ident() else nullcontext()


def running_stage() -> str:
    """The stage that the process is in, whichever of its threads asks."""
    return _running[-1]
