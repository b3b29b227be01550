"""Schedules: the grid of times t_0 = 1 > t_1 > ... > t_N = 0 that a latent passes on its way from noise to image.

Grids are host floats, so no GPU ever has to be waited for to read one.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from fastgrpo.resolution import Resolution

# height and width in pixels of what becomes one token of FLUX
_TOKEN_SIDE = 16
# of FLUX.2: more than 1024x1024 pixels
_MANY_TOKENS = 4300
# exp(10) leaves nearly all steps at t = 1
_MAX_MU = 10.0


@dataclass(frozen=True)
class LinearSchedule:
    """t_i = shift(1 - i / N) with shift(u) = shift * u / (1 + (shift - 1) * u).

    With a shift this is the grid of DanceGRPO and MixGRPO (shift 3); without, FLUX.1-schnell's.
    """

    num_steps: int
    shift: float = 1.0

    def __post_init__(self) -> None:
        _check(self.num_steps, self.shift)

    def __call__(self) -> tuple[float, ...]:
        return tuple(_shift(1.0 - i / self.num_steps, self.shift) for i in range(self.num_steps + 1))

    def evaluated(self, num_steps: int) -> tuple[float, ...]:
        """The grid of an evaluation in so many steps."""
        return replace(self, num_steps=num_steps)()


@dataclass(frozen=True)
class SD3Schedule:
    """What diffusers' FlowMatchEulerDiscreteScheduler gives: t runs from 1 to shift(1/1000), is shifted again, then 0.

    The shift acts twice on the smallest time, so the last step (.00893 -> 0 at N = 10) is tiny.
    """

    num_steps: int
    shift: float = 3.0

    def __post_init__(self) -> None:
        _check(self.num_steps, self.shift)

    def __call__(self) -> tuple[float, ...]:
        smallest = _shift(1.0 / 1000.0, self.shift)
        intervals = max(self.num_steps - 1, 1)
        times = (1.0 - (1.0 - smallest) * i / intervals for i in range(self.num_steps))
        return (*(_shift(t, self.shift) for t in times), 0.0)

    def evaluated(self, num_steps: int) -> tuple[float, ...]:
        """The grid of an evaluation in so many steps."""
        return replace(self, num_steps=num_steps)()


@dataclass(frozen=True)
class FewSteps(LinearSchedule):
    """SD3's shift in so few steps that its own grid would waste one, .009 to 0: evenly spaced, then shifted.

    For rollouts that are learned from by their images.  An evaluation takes SD3's own grid.
    """

    shift: float = 3.0

    def evaluated(self, num_steps: int) -> tuple[float, ...]:
        return SD3Schedule(num_steps, self.shift)()


@dataclass(frozen=True)
class OfResolution(ABC):
    """Evenly spaced times, shifted by how many tokens an image has.

    resolution: of an image in pixels, [height, width] or both in one.  It is model.resolution, whose grid all images
        of a run have, also those of prompts that ask for another resolution.
    """

    num_steps: int
    resolution: int | Sequence[int]

    def __post_init__(self) -> None:
        _check(self.num_steps, self.shift)

    @property
    @abstractmethod
    def shift(self) -> float:
        """exp(mu)."""

    def __call__(self) -> tuple[float, ...]:
        return LinearSchedule(self.num_steps, self.shift)()

    @property
    def num_tokens(self) -> int:
        """Of an image."""
        sides = Resolution.read(self.resolution, "algorithm.schedule.resolution")
        if min(sides) < _TOKEN_SIDE:
            raise ValueError(
                f"algorithm.schedule.resolution must be at least {_TOKEN_SIDE} pixels, got {sides}; it is "
                "model.resolution"
            )
        return math.prod(side // _TOKEN_SIDE for side in sides)

    def evaluated(self, num_steps: int) -> tuple[float, ...]:
        """The grid of an evaluation in so many steps."""
        return replace(self, num_steps=num_steps)()


@dataclass(frozen=True)
class FluxSchedule(OfResolution):
    """FLUX.1-dev's: evenly spaced times, shifted by exp(mu), where mu is linear in the number of image tokens.

    mu = base_shift at base_tokens (256x256 pixels) and max_shift at max_tokens (4096 are 1024x1024), as diffusers'
    FluxPipeline has it.  Qwen-Image's ends at ``terminal`` before its last step to 0: 1 - t is stretched to that.
    """

    base_shift: float = 0.5
    max_shift: float = 1.15
    base_tokens: int = 256
    max_tokens: int = 4096
    terminal: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.base_tokens < self.max_tokens:
            raise ValueError(
                "algorithm.schedule.base_tokens must be positive and less than max_tokens, got "
                f"{self.base_tokens} and {self.max_tokens}; FLUX.1-dev has 256 and 4096"
            )
        if not 0 <= self.terminal < 1:
            raise ValueError(
                f"algorithm.schedule.terminal must lie in [0, 1), got {self.terminal}; Qwen-Image has .02, others 0"
            )
        for field in ("base_shift", "max_shift"):
            if not abs(getattr(self, field)) <= _MAX_MU:
                raise ValueError(
                    f"algorithm.schedule.{field} must lie in [-{_MAX_MU:g}, {_MAX_MU:g}], got {getattr(self, field)}; "
                    "FLUX.1-dev has .5 and 1.15"
                )
        super().__post_init__()

    @property
    def shift(self) -> float:
        slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
        return math.exp(self.base_shift + slope * (self.num_tokens - self.base_tokens))

    def __call__(self) -> tuple[float, ...]:
        times = super().__call__()
        if not self.terminal or self.num_steps == 1:
            return times
        stretch = (1 - self.terminal) / (1 - times[-2])
        return (*(1 - stretch * (1 - t) for t in times[:-1]), 0.0)


@dataclass(frozen=True)
class Flux2Schedule(OfResolution):
    """FLUX.2's: mu depends on the number of image tokens and on the number of steps, as diffusers' pipelines have it.

    mu = a + b tokens at 10 and at 200 steps, and linear in the number of steps between and beyond; above 4,300 tokens
    that of 200 steps.
    """

    @property
    def shift(self) -> float:
        few, many = 8.73809524e-05 * self.num_tokens + 1.89833333, 0.00016927 * self.num_tokens + 0.45666666
        if self.num_tokens > _MANY_TOKENS:
            return math.exp(many)
        slope = (many - few) / (200 - 10)
        return math.exp(many - slope * (200 - self.num_steps))


@dataclass(frozen=True)
class GivenTimes:
    """These times, as a distilled model was published with: from 1 down to 0, both of which are part of it."""

    times: tuple[float, ...]

    def __post_init__(self) -> None:
        given: Any = self.times
        if isinstance(given, str | int | float) or not all(type(t) in (int, float) for t in given):
            raise ValueError(f"algorithm.schedule.times is a list of numbers, as in [1,.9,.5,0], got {given!r}")
        times = tuple(float(t) for t in given)
        falls = all(t > t_next for t, t_next in pairwise(times))
        if len(times) < 2 or times[0] != 1 or times[-1] != 0 or not falls:
            raise ValueError(f"algorithm.schedule.times must fall from 1 to 0, as in [1,.9,.5,0], got {list(times)}")
        object.__setattr__(self, "times", times)

    @property
    def num_steps(self) -> int:
        return len(self.times) - 1

    @property
    def shift(self) -> float:
        """That of an evenly spaced grid whose middle, at u = 1/2, is where that of these times is."""
        last, odd = divmod(self.num_steps, 2)
        middle = (self.times[last] + self.times[last + odd]) / 2
        return middle / (1 - middle)

    def __call__(self) -> tuple[float, ...]:
        return self.times

    def evaluated(self, num_steps: int) -> tuple[float, ...]:
        """The grid of an evaluation in so many steps."""
        if num_steps != self.num_steps:
            raise ValueError(
                f"algorithm.schedule.times are {self.num_steps} steps, and an evaluation of {num_steps} was asked for; "
                f"use evaluate.num_steps={self.num_steps}, or num_steps={self.num_steps} with fastgrpo sample"
            )
        return self.times


def _shift(u: float, shift: float) -> float:
    # rounding makes a little more than 1 of it for some shifts below 1
    return 1.0 if u == 1.0 else shift * u / (1.0 + (shift - 1.0) * u)


def _check(num_steps: int, shift: float) -> None:
    if num_steps < 1:
        raise ValueError(
            f"algorithm.schedule.num_steps must be at least 1, got {num_steps}; use 10 for training, 40 for evaluation"
        )
    if not 0 < shift < math.inf:
        raise ValueError(
            f"algorithm.schedule.shift must be positive and finite, got {shift}; use 1 for no shift, 3 for SD3"
        )
