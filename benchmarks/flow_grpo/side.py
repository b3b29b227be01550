"""What both sides of the comparison are: called, it runs one iteration and says how long its parts took."""

import time
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, kw_only=True)
class Iteration:
    """``rollout`` is everything before the update: text encoders, noise search, sampling, rewards, advantages."""

    num_images: int
    rollout_seconds: float
    update_seconds: float
    # of this process, all threads: on a busy machine it says more than the clock
    cpu_seconds: float
    peak_bytes: int
    # max |ratio - 1| before the first optimizer step, in each side's own way
    ratio_deviation: float

    @property
    def seconds(self) -> float:
        return self.rollout_seconds + self.update_seconds


class Side(Protocol):
    """One of the two."""

    def __call__(self) -> Iteration:
        """Run one and measure it."""


def now() -> float:
    """Seconds, once the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
