"""DiffusionNFT: one velocity that is drawn to good images and away from bad ones.  arXiv:2509.16117, equation 5.

    r    = clip(A / max_advantage, -1, 1) / 2 + 1/2
    v+-  = v_old +- beta (v - v_old)
    w+-  = mean |x0(v+-) - x_0|, detached, at least 1e-5
    loss = max_advantage / beta * (r |x0(v+) - x_0|^2 / w+ + (1 - r) |x0(v-) - x_0|^2 / w-) + kl_coef |v - v_ref|^2

x0(v) = x_t - t v.  The factor in front is that of the authors' code.  Where A = 0 the loss is 0, penalty included;
theirs is not, and draws such a sample back to v_old.  Letter: B samples.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from fastgrpo.algorithm.objective.images import check_coefficient, trained_alone
from fastgrpo_kernels import MatchingErrors

# of a mean absolute error: what the authors' code divides by at least
_LEAST_WEIGHT = 1e-5


@dataclass(frozen=True, kw_only=True)
class NFT:
    """``beta`` is how far v+ and v- lie apart, ``max_advantage`` the advantage from which a sample counts in full."""

    beta: float = 1.0
    max_advantage: float = 2.0
    kl_coef: float = 0.0

    signal: ClassVar[Literal["images"]] = "images"
    names: ClassVar[tuple[str, ...]] = ("drift", "kl")

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise ValueError(
                f"algorithm.objective.beta must be positive and finite, got {self.beta}: the loss divides by it; 1 and "
                ".1 are DiffusionNFT's"
            )
        if not 0 < self.max_advantage < math.inf:
            raise ValueError(
                f"algorithm.objective.max_advantage must be positive and finite, got {self.max_advantage}; 5 is "
                "DiffusionNFT's, 2 lets more samples count in full"
            )
        check_coefficient("kl_coef", self.kl_coef, "use 0 for no reference policy")

    def __call__(self, errors: MatchingErrors, t_B: Tensor, advantage_B: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        r_B = (advantage_B / self.max_advantage).clamp(-1, 1) / 2 + 0.5
        good_B = _weighted(errors.plus, errors.abs_plus, t_B)
        bad_B = _weighted(errors.minus, errors.abs_minus, t_B)
        policy_B = self.max_advantage / self.beta * (r_B * good_B + (1 - r_B) * bad_B)
        loss_B = policy_B + self.kl_coef * errors.reference
        return trained_alone(loss_B, advantage_B), {"drift": errors.drift, "kl": errors.reference}


def _weighted(square_B: Tensor, absolute_B: Tensor, t_B: Tensor) -> Tensor:
    """|x0(v) - x_0|^2 / w from the errors of the velocity."""
    return t_B.square() * square_B / (t_B * absolute_B).clamp(min=_LEAST_WEIGHT)
