"""Dynamics: one reverse step from t to t_next < t, as three numbers.

    mean     = c_x * x + c_v * v
    x_next   = mean + std * noise
    log_prob = that of x_next under N(mean, std^2), mean over elements; CPS drops the variance and the constants
    kl       = kl_weight * mean over elements of (mean - mean_reference)^2

The latent is x_t = (1 - t) x_0 + t eps, the velocity v = eps - x_0, so x0hat = x - t v and epshat = x + (1 - t) v, and
dt = t_next - t is negative.  s is the noise scale of the SDE, dx = drift dt + s dw: std = s sqrt(-dt).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fastgrpo_kernels import GuidedVelocity, LogProb, PhiloxNoise, ode_step, sde_log_prob, sde_step


@dataclass(frozen=True)
class StepCoefficients:
    """Host floats of one step; a deterministic one has std 0 and no log_prob."""

    c_x: float
    c_v: float
    std: float
    kl_weight: float
    log_prob_kind: LogProb = "gaussian"

    @property
    def precision(self) -> float:
        """log_prob is -precision (x_next - mean)^2, mean over elements, and what no policy moves."""
        return 0.5 / self.std**2 if self.log_prob_kind == "gaussian" else 1.0

    def mean(self, x: Tensor, v: Tensor | GuidedVelocity) -> Tensor:
        """Where a deterministic step leads."""
        return ode_step(x, v, *_per_sample(x, self.c_x, self.c_v))

    def step(self, x: Tensor, v: Tensor | GuidedVelocity, noise: Tensor | PhiloxNoise) -> tuple[Tensor, Tensor]:
        """x_next and its log_prob [B]; ValueError for a deterministic step, which has none."""
        if self.std == 0.0:
            raise ValueError("a deterministic step has no likelihood to train; use algorithm/dynamics=flow_sde")
        coefficients_B = _per_sample(x, self.c_x, self.c_v, self.std)
        x_next, log_prob_B, _ = sde_step(x, v, noise, *coefficients_B, log_prob=self.log_prob_kind)
        return x_next, log_prob_B

    def log_prob(
        self,
        x: Tensor,
        v: Tensor | GuidedVelocity,
        x_next: Tensor,
        v_reference: Tensor | GuidedVelocity | None,
    ) -> tuple[Tensor, Tensor]:
        """log_prob and KL [B] of a stored x_next, differentiable in v; bit for bit the log_prob that ``step`` gave."""
        *coefficients_B, kl_weight_B = _per_sample(x, self.c_x, self.c_v, self.std, self.kl_weight)
        return sde_log_prob(
            x,
            v,
            x_next,
            *coefficients_B,
            log_prob=self.log_prob_kind,
            v_reference=v_reference,
            kl_weight=None if v_reference is None else kl_weight_B,
        )


def _per_sample(x: Tensor, *values: float) -> tuple[float | Tensor, ...]:
    """What the kernels take: one number a sample; a compiler fuses the fills by itself."""
    if torch.compiler.is_compiling():
        return values
    # a FakeTensor, with which memory is planned, belongs to its mode: it may not be kept
    fill = _constant if type(x) is Tensor else _constant.__wrapped__
    return tuple(fill(value, len(x), x.device) for value in values)


# a step has the same few numbers in every iteration: filled once, not with a launch each
@lru_cache(maxsize=4096)
def _constant(value: float, num_samples: int, device: torch.device) -> Tensor:
    return torch.full((num_samples,), value, device=device)


Dynamics = Callable[[Sequence[float], int], StepCoefficients]


@dataclass(frozen=True)
class ODE:
    """Euler's method on dx = v dt: deterministic."""

    def __call__(self, grid: Sequence[float], step: int) -> StepCoefficients:
        return _deterministic(1.0, grid[step + 1] - grid[step])


@dataclass(frozen=True)
class FlowSDE:
    """Flow-GRPO's dynamics, s = noise_level * sqrt(t / (1 - t)).  arXiv:2505.05470, equation 9.

    At t = 1, where s is infinite, the denominator takes the grid's second time instead, as the published code does.
    """

    noise_level: float = 0.7

    def __post_init__(self) -> None:
        _check_positive(self.noise_level)

    def __call__(self, grid: Sequence[float], step: int) -> StepCoefficients:
        t = grid[step]
        finite = grid[1] if t == 1.0 else t
        return _sde(t, grid[step + 1], self.noise_level * math.sqrt(t / (1.0 - finite)))


@dataclass(frozen=True)
class DanceSDE:
    """DanceGRPO's dynamics, s = noise_level at every time.  arXiv:2505.07818."""

    noise_level: float = 0.3

    def __post_init__(self) -> None:
        _check_positive(self.noise_level)

    def __call__(self, grid: Sequence[float], step: int) -> StepCoefficients:
        return _sde(grid[step], grid[step + 1], self.noise_level)


@dataclass(frozen=True)
class CPS:
    """Coefficient-preserving sampling: part of epshat is exchanged for new noise of the same total scale.

    mean = (1 - t_next) x0hat + sqrt(t_next^2 - std^2) epshat with std = t_next sin(noise_level pi / 2).
    Its log_prob, as published, is -(x_next - mean)^2: without variance and constants.  arXiv:2509.05952.
    """

    noise_level: float = 0.8

    def __post_init__(self) -> None:
        _check_positive(self.noise_level)
        if self.noise_level > 1:
            raise ValueError(
                f"algorithm.dynamics.noise_level of CPS must be at most 1, got {self.noise_level}; 1 is all new noise"
            )

    def __call__(self, grid: Sequence[float], step: int) -> StepCoefficients:
        t, t_next = grid[step], grid[step + 1]
        angle = self.noise_level * math.pi / 2.0
        kept, std = t_next * math.cos(angle), t_next * math.sin(angle)
        c_x = 1.0 - t_next + kept
        c_v = kept * (1.0 - t) - (1.0 - t_next) * t
        if std == 0.0:
            return _deterministic(c_x, c_v)
        return StepCoefficients(c_x, c_v, std, kl_weight=0.5 / std**2, log_prob_kind="cps")


def _sde(t: float, t_next: float, s: float) -> StepCoefficients:
    """The reverse SDE of scale s that keeps the marginals of dx = v dt, by Euler-Maruyama."""
    dt = t_next - t
    std = s * math.sqrt(-dt)
    return StepCoefficients(
        c_x=1.0 + s**2 * dt / (2.0 * t),
        c_v=(1.0 + s**2 * (1.0 - t) / (2.0 * t)) * dt,
        std=std,
        # the published divergence divides by s^2 where a Gaussian's has std^2
        kl_weight=0.5 / s**2,
    )


def _deterministic(c_x: float, c_v: float) -> StepCoefficients:
    return StepCoefficients(c_x, c_v, std=0.0, kl_weight=0.0)


def _check_positive(noise_level: float) -> None:
    if not noise_level > 0:
        raise ValueError(
            f"algorithm.dynamics.noise_level must be positive, got {noise_level}; use algorithm/dynamics=ode for no "
            "noise"
        )
    if noise_level == math.inf:
        raise ValueError(f"algorithm.dynamics.noise_level must be finite, got {noise_level}; .7 is Flow-GRPO's")
