"""The contract of losses that learn from stochastic steps, stored with the log_prob that they had.

A step is x_next = mean + std z.  What a policy says of a stored one is its log_prob there; how far its mean has moved
from that of the old policy is exact, where log_prob is one sample's estimate.  Letter: B samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from fastgrpo_kernels import GRPOStats


@dataclass(frozen=True)
class Replayed:
    """A stored step of B samples under the policy as it is now; of several steps, the means over them.

    log_prob_B, kl_B: differentiable; the latter to the reference policy.
    distance_B: mean over elements of (mean - mean of the old policy)^2, differentiable; 0 unless it is asked for.
    std, duration: of the step, the latter t - t_next.
    precision: log_prob is -precision (x_next - mean)^2, mean over elements, and what no policy moves.
    """

    log_prob_B: Tensor
    old_log_prob_B: Tensor
    kl_B: Tensor
    distance_B: Tensor
    std: float = 1.0
    duration: float = 1.0
    precision: float = 0.5


class StepObjective(Protocol):
    """A loss of one step a sample, or of a chunk of steps."""

    @property
    def signal(self) -> Literal["steps"]:
        """What it learns from."""

    @property
    def kl_coef(self) -> float:
        """Weight of the KL to the reference policy, which runs where it is not 0."""

    @property
    def clip_range(self) -> float:
        """How far the ratio may move before a sample no longer counts: the scale of every other deviation from 1."""

    @property
    def needs_distance(self) -> bool:
        """Whether ``distance_B`` is asked for: the old policy's means are then kept."""

    def chunks(self, num_steps: int) -> Sequence[range]:
        """The trained steps, by their places, that are replayed together and have one ratio."""

    def __call__(self, replayed: Replayed, advantage_B: Tensor) -> tuple[Tensor, GRPOStats]:
        """The mean loss, differentiable in what is replayed, and its statistics."""


def single_steps(num_steps: int) -> list[range]:
    """Chunks of one step each."""
    return [range(place, place + 1) for place in range(num_steps)]
