"""Exponential moving average of the trained weights, for evaluation and export.

Of weights that are spread over ranks each rank averages its part: nothing travels.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class EMA:
    """average <- decay_n * average + (1 - decay_n) * weight, after the n-th update.

        decay_n = max(min(decay, (1 + n) / (10 + n)), 1 - 1 / (share n))        the second only where share n > 1

    So it ramps up at the start, and with a ``share`` the window of the average, 1 / (1 - decay_n) updates, grows with
    the run: it stays that share of it.  With ``decay`` 0 the average is the weight, whatever the share.
    arXiv:2312.02696, section 3.1, is a power of n in place of this.
    """

    def __init__(self, weights: dict[str, nn.Parameter], decay: float, share: float = 0.0) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"train.ema_decay must be in [0, 1), got {decay}; 0 evaluates the weights themselves")
        self.decay = decay
        self.share = share
        self.num_updates = 0
        self._weights = weights
        self.averages: dict[str, Tensor] = {name: weight.detach().clone() for name, weight in weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        if self.decay > 0 and (window := self.share * self.num_updates) > 1:
            decay = max(decay, 1 - 1 / window)
        averages = [own_part(average) for average in self.averages.values()]
        torch._foreach_lerp_(averages, [own_part(weight.detach()) for weight in self._weights.values()], 1 - decay)

    def load(self, averages: dict[str, Tensor], num_updates: int) -> None:
        self.num_updates = num_updates
        for name, average in self.averages.items():
            average.copy_(averages[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model holds the averages inside; its own weights come back bit for bit.

        To be entered outside of the model's ``gathered``, which does not see weights change.
        """
        own = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self._copy(self.averages)
        try:
            yield
        finally:
            self._copy(own)

    @torch.no_grad()
    def _copy(self, source: dict[str, Tensor]) -> None:
        for name, weight in self._weights.items():
            weight.copy_(source[name])


def own_part(weight: Tensor) -> Tensor:
    """This rank's part."""
    return weight.to_local() if isinstance(weight, DTensor) else weight
