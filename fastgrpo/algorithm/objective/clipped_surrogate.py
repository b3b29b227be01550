"""Objective: PPO's clipped surrogate with a penalty for leaving the reference policy.  Letter: B samples of one step.

ratio = exp(log_prob - old_log_prob)
loss  = mean over B of max(-A * ratio, -A * clip(ratio, 1 - clip_range, 1 + clip_range)) + kl_coef * kl
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from fastgrpo_kernels import GRPOStats, grpo_loss


@dataclass(frozen=True)
class ClippedSurrogate:
    """``clip_range`` belongs to the scale of log_prob, a mean over latent elements: 1e-4 for SDEs, 1e-5 for CPS."""

    clip_range: float = 1e-4
    kl_coef: float = 0.04

    signal: ClassVar[Literal["steps"]] = "steps"

    def __post_init__(self) -> None:
        if not 0 < self.clip_range < 1:
            raise ValueError(
                f"algorithm.objective.clip_range must lie in (0, 1), got {self.clip_range}; 1e-4 is Flow-GRPO's"
            )
        if not 0 <= self.kl_coef < math.inf:
            raise ValueError(
                f"algorithm.objective.kl_coef must be finite and not negative, got {self.kl_coef}; use 0 for no "
                "reference policy"
            )

    def __call__(
        self, log_prob_B: Tensor, old_log_prob_B: Tensor, advantage_B: Tensor, kl_B: Tensor
    ) -> tuple[Tensor, GRPOStats]:
        """The mean loss, differentiable in ``log_prob_B`` and ``kl_B``; the kernel's docstring tells the rest."""
        return grpo_loss(
            log_prob_B, old_log_prob_B, advantage_B, kl_B, clip_range=self.clip_range, kl_coef=self.kl_coef
        )
