"""Solvers: how a rollout follows dx = v dt where it is deterministic, from one time of its grid to a later one.

    Euler             x' = x + h v                                        h = t' - t
    Adams-Bashforth   x' = x + h ((1 + r / 2) v - r / 2 v_before)         r = h / h_before

With a stride only every so many times of the grid are visited.  To use a velocity for two steps of Euler is one step of
twice the size, so that is a stride of 2, and not a solver.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fastgrpo.algorithm.dynamics import ODE
from fastgrpo_kernels import GuidedVelocity, combined

# (x, t, unconditional branch of guidance if it is known) -> v
Velocity = Callable[[Tensor, float, Tensor | None], Tensor | GuidedVelocity]
# (x, grid, steps, velocity) -> x at grid[steps.stop]; steps are indices of the grid, one after the other
Solver = Callable[[Tensor, Sequence[float], range, Velocity], Tensor]


@dataclass(frozen=True, kw_only=True)
class Euler:
    """Order 1; with stride 1 it is what the dynamics ODE is."""

    stride: int = 1

    def __post_init__(self) -> None:
        _check("stride", self.stride, least=1)

    def __call__(self, x: Tensor, grid: Sequence[float], steps: range, velocity: Velocity) -> Tensor:
        for t, t_next in pairwise(visited(grid, steps, self.stride)):
            x = _step(x, t, t_next, velocity(x, t, None))
        return x


@dataclass(frozen=True, kw_only=True)
class AdamsBashforth:
    """Order 2 at Euler's cost: each step extrapolates the velocity from the one before, on uneven grids too.

    The first step, which has none before it, is Euler's.  Hairer, Norsett, Wanner, Solving ODEs I, III.5.
    """

    stride: int = 2

    def __post_init__(self) -> None:
        _check("stride", self.stride, least=1)

    def __call__(self, x: Tensor, grid: Sequence[float], steps: range, velocity: Velocity) -> Tensor:
        before: tuple[Tensor, float] | None = None
        for t, t_next in pairwise(visited(grid, steps, self.stride)):
            slope = v = combined(velocity(x, t, None))
            if before is not None:
                v_before, h_before = before
                slope = torch.lerp(v, v_before, -(t_next - t) / h_before / 2)
            x = _step(x, t, t_next, slope)
            before = v, t_next - t
        return x


@dataclass(frozen=True, kw_only=True)
class CachedGuidance:
    """Euler that computes both branches of guidance on every ``every``-th step, and their difference serves the others.

    The difference of the branches varies less from step to step than the branches do.  arXiv:2410.19355.
    """

    every: int = 2

    def __post_init__(self) -> None:
        _check("every", self.every, least=2)

    def __call__(self, x: Tensor, grid: Sequence[float], steps: range, velocity: Velocity) -> Tensor:
        difference = x.new_zeros(())
        for place, (t, t_next) in enumerate(pairwise(visited(grid, steps, 1))):
            is_known = place % self.every > 0
            # any known branch keeps the model from computing its own
            v = velocity(x, t, x if is_known else None)
            if not isinstance(v, GuidedVelocity):
                raise ValueError(
                    "solver=cached_guidance reuses a branch of guidance, and this model's velocity has none: "
                    "model.guidance_scale is 1, or its guidance is not linear; use solver=adams_bashforth"
                )
            if is_known:
                v = GuidedVelocity(v.conditional, v.conditional - difference, v.scale)
            else:
                difference = v.conditional - v.unconditional
            x = _step(x, t, t_next, v)
        return x


def visited(grid: Sequence[float], steps: range, stride: int) -> tuple[float, ...]:
    """Every ``stride``-th time of some steps, counted from their end, and where they begin.

    From the end, because the last step of SD3's grid, .009 to 0, is not worth a velocity of its own.
    """
    times = grid[steps.start : steps.stop + 1]
    kept = times[::-1][::stride][::-1]
    return tuple(kept if kept[0] == times[0] else (times[0], *kept))


def _step(x: Tensor, t: float, t_next: float, v: Tensor | GuidedVelocity) -> Tensor:
    return ODE()((t, t_next), 0).mean(x, v)


def _check(key: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"solver.{key} must be at least {least}, got {value}; solver=euler is exact")
