"""Objective: PPO's clipped surrogate with a penalty for leaving the reference policy.  Letter: B samples of one step.

ratio = exp(log_prob - old_log_prob)
loss  = max(-A * ratio, -A * clip(ratio, 1 - clip_range, 1 + clip_range)) + kl_coef * kl
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ObjectiveStats:
    """Scalars over a batch, left on its device: reading one waits for the GPU."""

    ratio_deviation: Tensor
    clip_fraction: Tensor
    kl: Tensor


@dataclass(frozen=True)
class ClippedSurrogate:
    """``clip_range`` belongs to the scale of log_prob, a mean over latent elements: 1e-4 for SDEs, 1e-5 for CPS."""

    clip_range: float = 1e-4
    kl_coef: float = 0.04

    def __post_init__(self) -> None:
        if not 0 < self.clip_range < 1:
            raise ValueError(f"objective.clip_range must lie in (0, 1), got {self.clip_range}; 1e-4 is Flow-GRPO's")
        if self.kl_coef < 0:
            raise ValueError(
                f"objective.kl_coef must not be negative, got {self.kl_coef}; use 0 for no reference policy"
            )

    def __call__(
        self, log_prob_B: Tensor, old_log_prob_B: Tensor, advantage_B: Tensor, kl_B: Tensor
    ) -> tuple[Tensor, ObjectiveStats]:
        """The loss of each sample, differentiable in ``log_prob_B`` and ``kl_B``; float32 in, float32 out."""
        ratio_B = torch.exp(log_prob_B - old_log_prob_B)
        clipped_B = ratio_B.clamp(1.0 - self.clip_range, 1.0 + self.clip_range)
        loss_B = torch.maximum(-advantage_B * ratio_B, -advantage_B * clipped_B) + self.kl_coef * kl_B
        deviation_B = (ratio_B.detach() - 1.0).abs()
        stats = ObjectiveStats(
            ratio_deviation=deviation_B.max(),
            clip_fraction=(deviation_B > self.clip_range).float().mean(),
            kl=kl_B.detach().mean(),
        )
        return loss_B, stats
