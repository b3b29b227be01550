"""Timesteps: where an iteration's trajectories are trained.

Steps, for an objective that learns from them: those chosen are stochastic and trained, all others are deterministic.
The last one is never trained: its noise is so small that its likelihood overflows.
Drawn times, for an objective that learns from images: where each of these is noised again.
Either is a function of the seed and the iteration, so every GPU and every resumed run makes the same choice.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# (num_steps, iteration, seed) -> the steps, ascending
Timesteps = Callable[[int, int, int], tuple[int, ...]]


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


@dataclass(frozen=True, kw_only=True)
class DrawnTimes:
    """``per_image`` pairs of t and noise for each image, drawn anew for each of an iteration's updates.

    t = shift u / (1 + (shift - 1) u) with u even over the part of [0, 1] that gives t in [low, high].  u is stratified:
    of n draws of a group one lies in each n-th, and of the P groups of an iteration one in each P-th of that.
    is_shared: all samples of a group are noised alike, so that they are told apart by their images alone.
    """

    per_image: int = 1
    shift: float = 3.0
    low: float = 0.0
    high: float = 1.0
    is_shared: bool = False

    def __post_init__(self) -> None:
        if self.per_image < 1:
            raise ValueError(f"algorithm.timesteps.per_image must be at least 1, got {self.per_image}")
        if not 0 < self.shift < float("inf"):
            raise ValueError(
                f"algorithm.timesteps.shift must be positive and finite, got {self.shift}; 1 draws all times alike"
            )
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(
                f"algorithm.timesteps.low and high must be a range within [0, 1], got [{self.low}, {self.high}]; use "
                "low=0 and high=1 for all times"
            )

    def __call__(self, num_prompts: int, group_size: int, num_updates: int, iteration: int, seed: int) -> Tensor:
        """t [num_updates, per_image, B] in float32 on the CPU, of all B = P * G samples of an iteration."""
        # another generator than that of the shares, which is seeded by the same numbers
        generator = torch.Generator().manual_seed((seed * 1_000_003 + iteration) ^ 0x5DEECE66D)
        slots = self.per_image * (1 if self.is_shared else group_size)
        u_UPS = torch.stack([_stratified(num_prompts, slots, generator) for _ in range(num_updates)])
        u_low, u_high = (_unshifted(t, self.shift) for t in (self.low, self.high))
        u_UPS = u_low + (u_high - u_low) * u_UPS
        t_UPDG = (self.shift * u_UPS / (1 + (self.shift - 1) * u_UPS)).unflatten(2, (self.per_image, -1))
        t_UDPG = t_UPDG.clamp(self.low, self.high).transpose(1, 2).expand(-1, -1, -1, group_size)
        return t_UDPG.flatten(2).float()


def _stratified(num_groups: int, slots: int, generator: torch.Generator) -> Tensor:
    """Numbers [P, S] in (0, 1): of each group one in each S-th, and there, of all groups, one in each P-th of it."""
    slot_PS = torch.stack([torch.randperm(slots, generator=generator) for _ in range(num_groups)])
    place_SP = torch.stack([torch.randperm(num_groups, generator=generator) for _ in range(slots)])
    place_PS = place_SP.T.gather(1, slot_PS)
    inside_PS = torch.rand(num_groups, slots, generator=generator, dtype=torch.float64)
    return (slot_PS + (place_PS + inside_PS) / num_groups) / slots


def _unshifted(t: float, shift: float) -> float:
    """The u that gives t."""
    return t / (shift - (shift - 1) * t)


def _num_trainable(num_steps: int) -> int:
    if num_steps < 2:
        raise ValueError(
            f"algorithm.schedule.num_steps must be at least 2 in training, got {num_steps}; the last is never trained"
        )
    return num_steps - 1


def _random(iteration: int, seed: int) -> random.Random:
    return random.Random(f"timesteps {seed} {iteration}")
