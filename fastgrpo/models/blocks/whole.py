"""A transformer's own forward pass, whole: for a family whose blocks are not written out here.

It is slower than a ``BlockNetwork``: attention is the transformer's own, nothing of a frozen transformer is computed
ahead, and torch.compile gets all of it as one graph.
Letters: B samples, C H W latent channels, height and width, M text tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from fastgrpo.models.attention import Attention
from fastgrpo.models.blocks.modulation import Modulations
from fastgrpo.models.blocks.network import exact_times
from fastgrpo.types import Conditions, Time


class WholeNetwork(ABC):
    """(transformer, x [B, C, H, W], t, conditions) -> v [B, C, H, W] in the type of the conditions."""

    has_own_attention = True

    def __init__(
        self, *, attention: Attention, compile: Callable[[Any], Any], checkpointing: bool, modulations: Modulations
    ) -> None:
        self._velocity = compile(self.velocity)
        self._checkpointing = checkpointing

    @abstractmethod
    def velocity(
        self, transformer: Any, x_BCHW: Tensor, t_B: Tensor, embeds_BMC: Tensor, pooled_BC: Tensor, lengths_B: Tensor
    ) -> Tensor:
        """noise - image [B, C, H, W], by a call of the transformer; t is 1 for noise, float32."""

    def __call__(self, transformer: Any, x_BCHW: Tensor, t: Time, conditions: Conditions) -> Tensor:
        modulations = self.modulations(transformer, t, conditions)
        return self.forward(transformer, x_BCHW, conditions.embeds_BLC, conditions.lengths_B, *modulations)

    def stacks(self, transformer: Any) -> Iterator[Sequence[nn.Module]]:
        """None: the transformer calls each layer by itself."""
        return iter(())

    def modulations(self, transformer: Any, t: Time, conditions: Conditions) -> Iterator[Tensor]:
        """The time, and the pooled embedding."""
        yield exact_times(t, conditions.embeds_BLC)
        yield conditions.pooled_BC

    def forward(self, transformer: Any, x_BCHW: Tensor, embeds_BMC: Tensor, lengths_B: Tensor, *rest: Tensor) -> Tensor:
        t_B, pooled_BC = rest
        if self._checkpointing and not transformer.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        v_BCHW: Tensor = self._velocity(transformer, x_BCHW.to(embeds_BMC.dtype), t_B, embeds_BMC, pooled_BC, lengths_B)
        return v_BCHW
