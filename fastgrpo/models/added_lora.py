"""A LoRA that was trained elsewhere as part of a transformer's frozen weights: W + scale B A for each of its layers.

So it may have any rank and be of any layers, and what is built over those weights need not know of it.
arXiv:2106.09685.  Letters: R rank, I inputs, O outputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LayerTerm:
    """What is added to the weight of one layer, scale * B A."""

    a_RI: Tensor
    b_OR: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return len(self.a_RI)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight; that of a convolution has the sides of its kernel too."""
        return (len(self.b_OR), *self.a_RI.shape[1:])

    def add_to(self, weight: Tensor) -> None:
        """W <- W + scale * B A, rounded once, to the type of W."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        a_RI, b_OR = (factor.to(weight.device, dtype).flatten(1) for factor in (self.a_RI, self.b_OR))
        sum_OI = torch.addmm(weight.to(dtype).flatten(1), b_OR, a_RI, alpha=self.scale)
        weight.copy_(sum_OI.view_as(weight))


@dataclass(frozen=True)
class AddedLoRA:
    """A LoRA of a transformer, by the names of its layers."""

    terms: Mapping[str, LayerTerm]

    @torch.no_grad()
    def add_to(self, transformer: nn.Module) -> None:
        """Change the weights of its layers in place."""
        for layer, term in self.terms.items():
            weight = transformer.get_submodule(layer).weight
            assert isinstance(weight, Tensor)
            term.add_to(weight)
