"""Flow-DPPO: the exact divergence of a step from the old policy's decides what is trained, not one sample's ratio.

    divergence = distance / (2 std^2)               mean over elements: KL(policy, old policy) of an element
    masked     = divergence > max_divergence and A (ratio - 1) > 0
    loss       = mean over B of -A ratio where it is not masked, + kl_coef kl

So a step that left the trusted region may come back, but goes no further.  arXiv:2606.11025.
Letter: B samples of one step.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fastgrpo.algorithm.objective.clipped_surrogate import check_kl_coef
from fastgrpo.algorithm.objective.steps import Replayed, single_steps
from fastgrpo_kernels import GRPOStats


@dataclass(frozen=True, kw_only=True)
class FlowDPPO:
    """``max_divergence`` is of one latent element, so it does not depend on how many there are."""

    max_divergence: float = 1e-5
    kl_coef: float = 0.0

    signal: ClassVar[Literal["steps"]] = "steps"
    needs_distance: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.max_divergence < math.inf:
            raise ValueError(
                f"algorithm.objective.max_divergence must be positive and finite, got {self.max_divergence}; 1e-5 "
                "suits the embedded model"
            )
        check_kl_coef(self.kl_coef)

    @property
    def clip_range(self) -> float:
        """A ratio that rounding alone moves so far is broken: it is a mean over elements, as the divergence is."""
        return self.max_divergence

    def chunks(self, num_steps: int) -> Sequence[range]:
        return single_steps(num_steps)

    def __call__(self, replayed: Replayed, advantage_B: Tensor) -> tuple[Tensor, GRPOStats]:
        log_ratio_B = replayed.log_prob_B.double() - replayed.old_log_prob_B.double()
        ratio_B, advantage_B = log_ratio_B.exp(), advantage_B.double()
        divergence_B = replayed.distance_B.double().detach() / (2 * replayed.std**2)
        is_masked_B = (divergence_B > self.max_divergence) & (advantage_B * (ratio_B.detach() - 1) > 0)
        count, kl = max(1, len(ratio_B)), replayed.kl_B.double()
        surrogate_B = torch.where(is_masked_B, torch.zeros_like(ratio_B), -advantage_B * ratio_B)
        loss = (surrogate_B.sum() + self.kl_coef * kl.sum()) / count
        deviation_B = (ratio_B.detach() - 1).abs()
        stats = GRPOStats(
            clip_fraction=is_masked_B.double().sum() / count,
            approx_kl=(ratio_B - 1 - log_ratio_B).detach().sum() / count,
            ratio_deviation=torch.cat([deviation_B, deviation_B.new_zeros(1)]).max(),
            kl=kl.detach().sum() / count,
        )
        return loss.float(), GRPOStats(*(value.float() for value in stats))
