"""The text encoders of a pipeline: loaded when a text is first wanted, on the device only while texts are encoded.

T5-XXL alone is 9.4 GB and takes a minute to load; with conditions cached on disk a run never loads it.  Their weights
never change, so they stay in host memory, and what is on the device is a copy that is dropped: 11 GB go one way, and
none come back.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from fastgrpo.loading import one_at_a_time
from fastgrpo.types import Conditions


class TextEncoders:
    """(texts) -> one row of conditions each.

    load: makes the encoders, and puts them where ``run`` finds them.  run: text -> its row.
    is_often: whether they are wanted again and again.  Their pages are then locked, which takes its time once, so that
        a GPU reads them at the speed of the bus.
    """

    def __init__(
        self,
        load: Callable[[], list[nn.Module]],
        run: Callable[[str], Conditions],
        device: torch.device,
        *,
        is_often: bool = False,
    ) -> None:
        self._load, self._run, self._device = load, run, device
        self._is_locked = is_often and device.type == "cuda"
        # each weight, and what it is in host memory; empty until they are loaded
        self._weights: list[tuple[Tensor, Tensor]] = []

    def __call__(self, texts: Sequence[str]) -> Iterator[Conditions]:
        self.make()
        for weight, on_host in self._weights:
            weight.data = on_host.to(self._device, non_blocking=True)
        try:
            for text in texts:
                # one text alone: a row is rounded as its batch wills, and a resumed run meets texts in other batches
                with torch.no_grad():
                    row = self._run(text)
                yield row
        finally:
            for weight, on_host in self._weights:
                weight.data = on_host

    def make(self) -> None:
        """Load them, if that has not been done."""
        if self._weights:
            return
        with one_at_a_time:
            modules = [module.requires_grad_(False).eval() for module in self._load()]
        for weight in chain.from_iterable((*module.parameters(), *module.buffers()) for module in modules):
            if self._is_locked:
                weight.data = weight.data.pin_memory()
            self._weights.append((weight, weight.data))

    def forget(self) -> None:
        """Let go of them; a text that is wanted after all loads them again."""
        self._weights = []
