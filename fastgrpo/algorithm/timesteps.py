"""Timesteps: which steps of an iteration's trajectories are stochastic and trained; all others are deterministic.

A choice is a function of (num_steps, iteration, seed) alone, so every GPU and every resumed run makes the same one.
The last step is never trained: its noise is so small that its likelihood overflows.
"""

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class AllButLast:
    """Steps 0 ... N - 2.  arXiv:2505.05470."""

    def __call__(self, num_steps: int, iteration: int, seed: int) -> tuple[int, ...]:
        return tuple(range(_num_trainable(num_steps)))


@dataclass(frozen=True)
class RandomWindow:
    """``size`` neighboring steps somewhere in [low, high), drawn once an iteration: Flow-GRPO-Fast."""

    size: int = 3
    low: int = 0
    high: int = 5

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"algorithm.timesteps.size must be at least 1, got {self.size}")
        if self.low < 0:
            raise ValueError(f"algorithm.timesteps.low must be at least 0, got {self.low}")
        if self.low + self.size > self.high:
            raise ValueError(
                f"algorithm.timesteps.size {self.size} does not fit into [low, high) = [{self.low}, {self.high}); "
                "lower size or raise high"
            )

    def __call__(self, num_steps: int, iteration: int, seed: int) -> tuple[int, ...]:
        if self.high > _num_trainable(num_steps):
            raise ValueError(
                f"algorithm.timesteps.high must be at most num_steps - 1 = {num_steps - 1}, got {self.high}; "
                "lower high or raise algorithm.schedule.num_steps"
            )
        start = _random(iteration, seed).randint(self.low, self.high - self.size)
        return tuple(range(start, start + self.size))


@dataclass(frozen=True)
class SlidingWindow:
    """``size`` neighboring steps that move by ``stride`` ``every`` so many iterations, and begin again at the end.

    arXiv:2507.21802 (MixGRPO).
    """

    size: int = 4
    stride: int = 1
    every: int = 25

    def __post_init__(self) -> None:
        for field in ("size", "stride", "every"):
            if getattr(self, field) < 1:
                raise ValueError(f"algorithm.timesteps.{field} must be at least 1, got {getattr(self, field)}")

    def __call__(self, num_steps: int, iteration: int, seed: int) -> tuple[int, ...]:
        free = _num_trainable(num_steps) - self.size
        if free < 0:
            raise ValueError(
                f"algorithm.timesteps.size must be at most num_steps - 1 = {num_steps - 1}, got {self.size}; "
                "lower size or raise algorithm.schedule.num_steps"
            )
        num_positions = free // self.stride + 1
        start = iteration // self.every % num_positions * self.stride
        return tuple(range(start, start + self.size))


@dataclass(frozen=True)
class RandomSubset:
    """A share of all steps but the last, drawn anew each iteration.  arXiv:2505.07818 (DanceGRPO).

    There the steps left out are stochastic too; here they are deterministic.
    """

    share: float = 0.6

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(
                f"algorithm.timesteps.share must lie in (0, 1], got {self.share}; use 1 to train all steps but the last"
            )

    def __call__(self, num_steps: int, iteration: int, seed: int) -> tuple[int, ...]:
        trainable = _num_trainable(num_steps)
        size = max(1, round(self.share * trainable))
        return tuple(sorted(_random(iteration, seed).sample(range(trainable), size)))


def _num_trainable(num_steps: int) -> int:
    if num_steps < 2:
        raise ValueError(
            f"algorithm.schedule.num_steps must be at least 2 in training, got {num_steps}; the last is never trained"
        )
    return num_steps - 1


def _random(iteration: int, seed: int) -> random.Random:
    return random.Random(f"timesteps {seed} {iteration}")
