"""Reward-weighted regression: images that are better than their group are matched, others are not trained on.

    loss = max(A, 0) mean |v - u|^2 + proximal_coef mean |v - v_old|^2 + kl_coef mean |v - v_ref|^2,   u = eps - x_0

Where A <= 0 the loss is 0, penalties included.  Peters and Schaal, "Reinforcement learning by reward-weighted
regression" (ICML 2007).  Letter: B samples.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from fastgrpo.algorithm.objective.images import check_coefficient, trained_alone
from fastgrpo_kernels import MatchingErrors


@dataclass(frozen=True, kw_only=True)
class WeightedRegression:
    """The proximal term holds the samples that are matched to what the policy was, too."""

    proximal_coef: float = 0.0
    kl_coef: float = 0.0

    signal: ClassVar[Literal["images"]] = "images"
    names: ClassVar[tuple[str, ...]] = ("drift", "kl")
    beta: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        check_coefficient("proximal_coef", self.proximal_coef, "use 0 for no proximal term")
        check_coefficient("kl_coef", self.kl_coef, "use 0 for no reference policy")

    def __call__(self, errors: MatchingErrors, t_B: Tensor, advantage_B: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        weight_B = advantage_B.clamp(min=0)
        loss_B = weight_B * errors.plus + self.proximal_coef * errors.drift + self.kl_coef * errors.reference
        return trained_alone(loss_B, weight_B), {"drift": errors.drift, "kl": errors.reference}
