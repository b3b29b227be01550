"""The forward pass over a transformer's weights, in two parts: modulations, and what remains when they are known.

    modulations = modulate(t, pooled text)              depend on (t, prompt) alone
    v           = forward(x, embeddings, lengths, modulations)

A family writes these two, over diffusers' weights but not by diffusers' code: so each kind of block is one function,
which is compiled once and checkpointed, attention is chosen in one place, and modulations of a frozen transformer are
computed once a (t, prompt).
Letters: B samples, C H W latent channels, height and width, M text tokens, E width of a modulation.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastgrpo.models.attention import Attention
from fastgrpo.models.blocks.heads import attention_stacks
from fastgrpo.models.blocks.modulation import Modulations
from fastgrpo.models.sharding import over
from fastgrpo.types import Conditions, Time


class BlockNetwork(ABC):
    """(transformer, x [B, C, H, W], t, conditions) -> v [B, C, H, W] in the type of the conditions."""

    # the kinds of blocks, each a function (block, *tensors, attention): what is compiled
    blocks: tuple[Callable[..., Any], ...]

    def __init__(
        self, *, attention: Attention, compile: Callable[[Any], Any], checkpointing: bool, modulations: Modulations
    ) -> None:
        self._attention = attention
        self._runs = {block: compile(block) for block in self.blocks}
        self._checkpointing = checkpointing
        self._modulations = modulations

    def __call__(self, transformer: Any, x_BCHW: Tensor, t: Time, conditions: Conditions) -> Tensor:
        modulations = self.modulations(transformer, t, conditions)
        return self.forward(transformer, x_BCHW, conditions.embeds_BLC, conditions.lengths_B, *modulations)

    def stacks(self, transformer: Any) -> Iterator[Sequence[nn.Module]]:
        """Layers that read one input, and that the blocks run by ``projected``."""
        return attention_stacks(transformer)

    def modulations(self, transformer: Any, t: Time, conditions: Conditions) -> Iterator[Tensor]:
        return self._modulations(transformer, t, conditions, self.modulate)

    @abstractmethod
    def modulate(self, transformer: Any, t: Time, pooled_BC: Tensor) -> Iterator[Tensor]:
        """Modulations [B, E] in the order in which ``forward`` takes them."""

    @abstractmethod
    def forward(
        self, transformer: Any, x_BCHW: Tensor, embeds_BMC: Tensor, lengths_B: Tensor, *modulations_BE: Tensor
    ) -> Tensor:
        """A function of tensors."""

    def run(self, function: Callable[..., Any], block: Any, *inputs: Any) -> Any:
        """One of ``blocks`` over a block; with checkpointing its inputs alone are kept for the backward pass."""
        run = self._runs[function]
        if self._checkpointing and torch.is_grad_enabled():
            # weights are gathered around it: they are there when it runs again
            run = partial(checkpoint, run, use_reentrant=False)
        return over(block, run, *inputs, self._attention)


def times(t: Time, like_BC: Tensor) -> Tensor:
    """[B], in the type of ``like_BC`` [B, ...]."""
    return t.to(like_BC.dtype) if isinstance(t, Tensor) else like_BC.new_full((len(like_BC),), t)


def exact_times(t: Time, like_BC: Tensor) -> Tensor:
    """[B], not rounded to the type of the weights, on the device of ``like_BC`` [B, ...]."""
    return t if isinstance(t, Tensor) else torch.full((len(like_BC),), t, device=like_BC.device)


def clipped(x: Tensor) -> Tensor:
    # activations of some models leave the range of float16
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x
