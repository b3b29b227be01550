"""AWM and V-GRPO: the error of matching an image's velocity stands for its log-likelihood, in PPO's clipped loss.

    l     = mean |v - u|^2,   l_old = mean |v_old - u|^2,   u = eps - x_0
    ratio = exp(t^time_power (l_old - l))
    loss  = max(-A ratio, -A clip(ratio, 1 - clip_range, 1 + clip_range))
            + proximal_coef mean |v - v_old|^2 + kl_coef mean |v - v_ref|^2

At ratio 1 its gradient is that of A t^time_power l: advantage-weighted matching (AWM, arXiv:2509.25050).  V-GRPO is the
same at (t, eps) that a group shares, without the proximal term.  Where A = 0 the loss is 0, penalties included.
Letter: B samples.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fastgrpo.algorithm.objective.images import check_coefficient, trained_alone
from fastgrpo_kernels import MatchingErrors


@dataclass(frozen=True, kw_only=True)
class MatchingRatio:
    """``clip_range`` bounds the ratio; ``time_power`` 0 weighs all times alike, 2 weighs the error of x_0 itself."""

    clip_range: float = 0.2
    time_power: float = 0.0
    proximal_coef: float = 0.0
    kl_coef: float = 0.0

    signal: ClassVar[Literal["images"]] = "images"
    names: ClassVar[tuple[str, ...]] = ("drift", "kl", "clip_fraction")
    # plus is then the error of v itself
    beta: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.clip_range < math.inf:
            raise ValueError(
                f"algorithm.objective.clip_range must be positive, got {self.clip_range}; .05 to 1 suits errors of a "
                "mean over latent elements"
            )
        check_coefficient("time_power", self.time_power, "0 weighs all times alike")
        check_coefficient("proximal_coef", self.proximal_coef, "use 0 for no proximal term")
        check_coefficient("kl_coef", self.kl_coef, "use 0 for no reference policy")

    def __call__(self, errors: MatchingErrors, t_B: Tensor, advantage_B: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        ratio_B = (t_B.pow(self.time_power) * (errors.old - errors.plus)).exp()
        clipped_B = ratio_B.clamp(max(0.0, 1 - self.clip_range), 1 + self.clip_range)
        policy_B = torch.maximum(-advantage_B * ratio_B, -advantage_B * clipped_B)
        loss_B = policy_B + self.proximal_coef * errors.drift + self.kl_coef * errors.reference
        outside_B = ((ratio_B.detach() - 1).abs() > self.clip_range).to(loss_B.dtype)
        return trained_alone(loss_B, advantage_B), {
            "drift": errors.drift,
            "kl": errors.reference,
            "clip_fraction": outside_B,
        }
