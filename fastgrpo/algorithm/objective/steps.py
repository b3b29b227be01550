"""The contract of losses that learn from stochastic steps, stored with the log_prob that they had.

Letter: B samples at one stored step each.
"""

from typing import Literal, Protocol

from torch import Tensor

from fastgrpo_kernels import GRPOStats


class StepObjective(Protocol):
    """A loss of one step a sample."""

    @property
    def signal(self) -> Literal["steps"]:
        """What it learns from."""

    @property
    def kl_coef(self) -> float:
        """Weight of the KL to the reference policy, which runs where it is not 0."""

    @property
    def clip_range(self) -> float:
        """How far the ratio may move before a sample no longer counts: the scale of every other deviation from 1."""

    def __call__(
        self, log_prob_B: Tensor, old_log_prob_B: Tensor, advantage_B: Tensor, kl_B: Tensor
    ) -> tuple[Tensor, GRPOStats]:
        """The mean loss, differentiable in ``log_prob_B`` and ``kl_B``, and its statistics."""
