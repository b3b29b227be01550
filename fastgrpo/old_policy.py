"""The old policy: what rollouts sample, and what the policy is compared with where it learns from images.

It is the policy itself as it is when an iteration begins, or one that follows it slowly:

    old <- decay old + (1 - decay) policy           after iteration n,      decay = min(growth n, limit)

so that one iteration's mistake is not all that the next one samples.  Source: the authors' code of DiffusionNFT
(arXiv:2509.16117), whose growth is .001 an optimizer step, of which an iteration may have several, and limit .5.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastgrpo.ema import own_part


class OldPolicy:
    """``weights`` are the policy's; with ``growth`` 0 it is the policy, and nothing is kept."""

    def __init__(self, weights: dict[str, nn.Parameter], growth: float = 0.0, limit: float = 0.5) -> None:
        self.growth, self.limit = growth, limit
        self.num_iterations = 0
        self._policy = weights
        self.weights: dict[str, Tensor] = (
            {name: weight.detach().clone() for name, weight in weights.items()} if growth > 0 else {}
        )

    @property
    def lags(self) -> bool:
        """Whether it is another than the policy when an iteration begins."""
        return bool(self.weights)

    @torch.no_grad()
    def follow(self) -> None:
        """After an iteration."""
        self.num_iterations += 1
        decay = min(self.growth * self.num_iterations, self.limit)
        if self.lags:
            old = [own_part(weight) for weight in self.weights.values()]
            torch._foreach_lerp_(old, [own_part(weight.detach()) for weight in self._policy.values()], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model holds it inside; the policy's weights come back bit for bit.

        To be entered outside of the model's ``gathered``, which does not see weights change.
        """
        if not self.lags:
            yield
            return
        policy = {name: weight.detach().clone() for name, weight in self._policy.items()}
        self._copy(self.weights)
        try:
            yield
        finally:
            self._copy(policy)

    def load(self, weights: dict[str, Tensor], num_iterations: int) -> None:
        """Go on from what a checkpoint holds."""
        self.num_iterations = num_iterations
        for name, weight in self.weights.items():
            weight.copy_(weights[name])

    @torch.no_grad()
    def _copy(self, source: dict[str, Tensor]) -> None:
        for name, weight in self._policy.items():
            weight.copy_(source[name])
