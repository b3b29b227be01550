"""The text encoders of a pipeline: loaded when a text is first wanted, on the device only while texts are encoded.

T5-XXL alone is 9.4 GB and takes a minute to load; with conditions cached on disk a run never loads it.
Letters: L text tokens, C width of an embedding.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from fastgrpo.types import Conditions


class TextEncoders:
    """(texts) -> one row of conditions each.

    load: makes the encoders, and puts them where ``run`` finds them.  run: text -> [1, L, C] and [1, C].
    """

    def __init__(
        self, load: Callable[[], list[nn.Module]], run: Callable[[str], tuple[Tensor, Tensor]], device: torch.device
    ) -> None:
        self._load, self._run, self._device = load, run, device
        self._modules: list[nn.Module] = []

    def __call__(self, texts: Sequence[str]) -> Iterator[Conditions]:
        self.make()
        self._move(self._device)
        try:
            for text in texts:
                # one text alone: a row is rounded as its batch wills, and a resumed run meets texts in other batches
                with torch.no_grad():
                    embeds_BLC, pooled_BC = self._run(text)
                yield Conditions(embeds_BLC, pooled_BC)
        finally:
            self._move("cpu")

    def make(self) -> None:
        """Load them, if that has not been done."""
        if not self._modules:
            self._modules = [module.requires_grad_(False).eval() for module in self._load()]

    def _move(self, device: torch.device | str) -> None:
        for module in self._modules:
            module.to(device)
