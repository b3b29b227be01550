"""What ``update`` computes again under gradient, and the loss of it: the contract of the two signals.

``step_replay.py`` replays the stochastic steps of a rollout, ``image_replay.py`` noises its images again.
Letters: B samples of this rank, C H W of a latent.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

from torch import Tensor

from fastgrpo.algorithm.objective.images import ImageObjective
from fastgrpo.algorithm.objective.steps import StepObjective
from fastgrpo.types import Conditions, SampleGradients

# rows of a tensor along a dimension
Select = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Term:
    """The loss of one batch at one step or draw, and the means over its samples that are logged.

    ``deviation``, where it is known, says how far rollout and update disagree about the same policy.
    """

    num_samples: int
    loss: Tensor
    means: Mapping[str, Tensor]
    deviation: Tensor | None = None


class Material(Protocol):
    """What an iteration is learned from, one row a sample."""

    def select(self, select: Select) -> Self:
        """Some of the samples."""


class Replay(Protocol):
    """What ``update`` knows of a signal."""

    @property
    def objective(self) -> StepObjective | ImageObjective:
        """The loss of a term."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the means of a term."""

    @property
    def has_log_prob(self) -> bool:
        """Whether a rollout can take the gradient of what is learned, that of each step's log_prob."""

    @property
    def deviation_name(self) -> str:
        """Of the metric that is the largest deviation before the first optimizer step."""

    @property
    def max_deviation(self) -> float:
        """What it may be in a run that goes on."""

    def begin(self, trained: Any, conditions_B: Conditions, iteration: int, num_updates: int, num_shares: int) -> Any:
        """The material, with all of the old policy that it needs: before the weights change."""

    def num_terms(self, material: Any) -> int:
        """Terms of a sample in an update."""

    def term(
        self, material: Any, place: int, conditions: Conditions, advantages_B: Tensor, step: int, update: int
    ) -> Term:
        """One of them of a batch, under gradient, in the ``step``-th optimizer step; its first rows have advantages."""

    def rehearse(self, x_BCHW: Tensor, conditions: Conditions) -> None:
        """A term and its gradient of samples that are no matter: what it takes of memory."""

    def reweighted(self, material: Any, advantages_B: Tensor, gradients: Sequence[SampleGradients]) -> list[Term]:
        """Terms whose gradients the rollout took."""
