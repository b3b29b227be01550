"""GRPO-Guard: ratios that are centred at 1 and spread alike at every step, and gradients of one size.

    log ratio = log_prob - old_log_prob + precision distance        its mean under the old policy is 0, not negative
                divided by 2 precision std                          then it is mean over elements of (mean - mean_old) z
    loss      = clipped surrogate of it / duration + kl_coef kl

For Flow-GRPO's Gaussian the divisor is a factor std, as it is published.  arXiv:2510.22319, section 4.
Letter: B samples of one step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fastgrpo.algorithm.objective.clipped_surrogate import check_clip_range, check_kl_coef
from fastgrpo.algorithm.objective.steps import Replayed, single_steps
from fastgrpo_kernels import GRPOStats, grpo_loss


@dataclass(frozen=True, kw_only=True)
class GRPOGuard:
    """``clip_range`` is on the scale of the normalized ratio: the same for every dynamics and step."""

    clip_range: float = 2e-6
    kl_coef: float = 0.0

    signal: ClassVar[Literal["steps"]] = "steps"
    needs_distance: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_clip_range(self.clip_range, "2e-6 is GRPO-Guard's")
        check_kl_coef(self.kl_coef)

    def chunks(self, num_steps: int) -> Sequence[range]:
        return single_steps(num_steps)

    def __call__(self, replayed: Replayed, advantage_B: Tensor) -> tuple[Tensor, GRPOStats]:
        # the differences of two nearly equal numbers: float32 holds too few digits of the ratio for its clip range
        moved_B = replayed.log_prob_B.double() - replayed.old_log_prob_B.double()
        centred_B = moved_B + replayed.precision * replayed.distance_B.double()
        log_ratio_B = centred_B / (2 * replayed.precision * replayed.std)
        return grpo_loss(
            log_ratio_B,
            torch.zeros_like(log_ratio_B),
            advantage_B.double() / replayed.duration,
            replayed.kl_B.double(),
            clip_range=self.clip_range,
            kl_coef=self.kl_coef,
        )
