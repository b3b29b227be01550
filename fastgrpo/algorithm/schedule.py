"""Schedules: the grid of times t_0 = 1 > t_1 > ... > t_N = 0 that a latent passes on its way from noise to image.

Grids are host floats, so no GPU ever has to be waited for to read one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fastgrpo.resolution import Resolution

# height and width in pixels of what becomes one token of FLUX
_TOKEN_SIDE = 16
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
class FluxSchedule:
    """FLUX.1-dev's: evenly spaced times, shifted by exp(mu), where mu is linear in the number of image tokens.

    mu = base_shift at 256 tokens (256x256 pixels) and max_shift at 4096 (1024x1024), as diffusers' FluxPipeline has it.
    resolution: of an image in pixels, [height, width] or both in one.  It is model.resolution, whose grid all images
        of a run have, also those of prompts that ask for another resolution.
    """

    num_steps: int
    resolution: int | Sequence[int]
    base_shift: float = 0.5
    max_shift: float = 1.15

    def __post_init__(self) -> None:
        for field in ("base_shift", "max_shift"):
            if not abs(getattr(self, field)) <= _MAX_MU:
                raise ValueError(
                    f"algorithm.schedule.{field} must lie in [-{_MAX_MU:g}, {_MAX_MU:g}], got {getattr(self, field)}; "
                    "FLUX.1-dev has .5 and 1.15"
                )
        if min(self._sides) < _TOKEN_SIDE:
            raise ValueError(
                f"algorithm.schedule.resolution must be at least {_TOKEN_SIDE} pixels, got {self._sides}; it is "
                "model.resolution"
            )
        _check(self.num_steps, self.shift)

    @property
    def shift(self) -> float:
        """exp(mu)."""
        num_tokens = math.prod(side // _TOKEN_SIDE for side in self._sides)
        slope = (self.max_shift - self.base_shift) / (4096 - 256)
        return math.exp(self.base_shift + slope * (num_tokens - 256))

    @property
    def _sides(self) -> Resolution:
        return Resolution.read(self.resolution, "algorithm.schedule.resolution")

    def __call__(self) -> tuple[float, ...]:
        return LinearSchedule(self.num_steps, self.shift)()

    def evaluated(self, num_steps: int) -> tuple[float, ...]:
        """The grid of an evaluation in so many steps."""
        return replace(self, num_steps=num_steps)()


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
