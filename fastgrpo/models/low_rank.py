"""Linear layers with a trained low-rank term, as one product for all that read the same input.

    y_p = W_p x + s B_p A_p x           of each part p, such as queries, keys and values
    y   = [W, s B] [x, A x]             W and A are stacked, B is block-diagonal: a part's rank is its own

So a trained layer costs a product that is a few columns wider, and one thin one, in place of three; the gradient is
written out below for the same reason.  The A and B that are trained are float32; copies of A and s B stand beside W in
the type that is computed in, made anew when the trained ones have changed (``refresh``).  arXiv:2106.09685.
Letters: B samples, L tokens, I inputs, O outputs and R ranks of all parts together, K = I + R.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class Mode:
    """What all adapters of a transformer do: nothing, or add their terms, times ``gain_B`` where it is given."""

    is_off: bool = False
    gain_B: Tensor | None = None


class LoRALinear(nn.Module):
    """A frozen linear layer with a trained low-rank term; ``projection`` computes it."""

    projection: "Projection"
    place: int

    def __init__(self, base: nn.Linear, rank: int, scale: float, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.base = base
        self.scale = scale
        # over half precision an optimizer step would be lost in rounding
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        place: dict[str, Any] = {"device": base.weight.device, "dtype": dtype}
        a_RI = torch.randn(rank, base.in_features, generator=generator) / rank
        self.lora_A = nn.Parameter(a_RI.to(**place))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, **place))
        # A and B of each sample, where a gradient is wanted of each
        self.of_samples: tuple[Tensor, Tensor] | None = None

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """A [rank, in] and B [out, rank], which gradients are of; a copy for each sample inside ``by_sample``."""
        return self.of_samples or (self.lora_A, self.lora_B)

    def forward(self, x_BLI: Tensor) -> Tensor:
        # by itself it costs what all that it is stacked with cost: those who know of these call ``projected``
        return self.projection(x_BLI)[self.place]

    @torch.no_grad()
    def merge(self) -> None:
        """W <- W + scale * B A, rounded once, to the type of W."""
        weight = self.base.weight
        weight.copy_(torch.addmm(weight.to(self.lora_A.dtype), self.lora_B, self.lora_A, alpha=self.scale))


def projected(layers: Sequence[nn.Module], x_BLI: Tensor) -> tuple[Tensor, ...]:
    """What each of some layers makes of one input: by one product where they are stacked."""
    first = layers[0]
    if isinstance(first, LoRALinear) and len(first.projection.layers) == len(layers):
        return first.projection(x_BLI)
    return tuple(layer(x_BLI) for layer in layers)


class Projection:
    """Adapted layers of one input; the weights of their bases become views of one tensor."""

    def __init__(self, layers: Sequence[LoRALinear], mode: Mode) -> None:
        self.layers = list(layers)
        self.mode = mode
        bases = [layer.base for layer in layers]
        self.widths = [base.out_features for base in bases]
        self._ranks = [len(layer.lora_A) for layer in layers]
        self._num_inputs = bases[0].in_features
        weight = bases[0].weight
        self.joined_OK = weight.new_zeros(sum(self.widths), self._num_inputs + sum(self._ranks), requires_grad=False)
        self.a_RI = weight.new_empty(sum(self._ranks), self._num_inputs, requires_grad=False)
        self.bias_O = None if bases[0].bias is None else torch.cat([base.bias.detach() for base in bases])
        self._weight_OI = self.joined_OK[:, : self._num_inputs]
        # of the factors, when they were copied
        self._version = -1
        for place, rows_OI in enumerate(self._weight_OI.split(self.widths)):
            layer = self.layers[place]
            rows_OI.copy_(layer.base.weight.detach())
            layer.base.weight = nn.Parameter(rows_OI, requires_grad=False)
            layer.projection, layer.place = self, place

    def __call__(self, x_BLI: Tensor) -> tuple[Tensor, ...]:
        """The outputs [B, L, O of the part] of the parts, views of one tensor."""
        # compiled code cannot look at versions: who runs it has called refresh
        if not torch.compiler.is_compiling():
            refresh([self])
        if self.mode.is_off:
            y_BLO = F.linear(x_BLI, self._weight_OI, self.bias_O)
        elif torch.is_grad_enabled():
            assert self.mode.gain_B is None, "the reference is computed without gradient"
            factors = chain(*(layer.factors for layer in self.layers))
            y_BLO = _Product.apply(x_BLI, self.joined_OK, self.bias_O, self.a_RI, self.layers[0].scale, *factors)
        else:
            x_BLK = _with_low(x_BLI, self.a_RI, self.mode.gain_B)
            y_BLO = F.linear(x_BLK, self.joined_OK, self.bias_O)
        return y_BLO.split(self.widths, dim=-1)

    def take_stale(self) -> list[tuple[Tensor, Tensor, float]]:
        """(where a copy of a factor is, the factor, what it is multiplied by), of all if one of them has changed."""
        factors = [factor for layer in self.layers for factor in (layer.lora_A, layer.lora_B)]
        version = sum(factor._version for factor in factors)
        if version == self._version:
            return []
        self._version = version
        places_RI = self.a_RI.split(self._ranks)
        columns_OR = self.joined_OK[:, self._num_inputs :].split(self._ranks, dim=1)
        places_OR = [own_OR.split(self.widths)[place] for place, own_OR in enumerate(columns_OR)]
        return [
            *((place, layer.lora_A, 1.0) for place, layer in zip(places_RI, self.layers, strict=True)),
            *((place, layer.lora_B, layer.scale) for place, layer in zip(places_OR, self.layers, strict=True)),
        ]


@torch.no_grad()
def refresh(projections: Iterable[Projection]) -> None:
    """Copy the factors that have changed: in place, by anything that counts their version up."""
    stale = [copy for projection in projections for copy in projection.take_stale()]
    if stale:
        places, factors, scales = zip(*stale, strict=True)
        torch._foreach_copy_(list(places), torch._foreach_mul(list(factors), list(scales)))


def _with_low(x_BLI: Tensor, a_RI: Tensor, gain_B: Tensor | None = None) -> Tensor:
    """[x, gain A x], in one tensor."""
    low_BLR = F.linear(x_BLI, a_RI)
    if gain_B is not None:
        low_BLR = low_BLR * gain_B.to(low_BLR.dtype)[:, None, None]
    return torch.cat([x_BLI, low_BLR], dim=-1)


class _Product(torch.autograd.Function):
    """y = [W, s B] [x, A x] + b, whose gradient goes to x and to the factors (A_1, B_1, A_2, B_2, ...) themselves."""

    @staticmethod
    def forward(
        ctx: Any, x_BLI: Tensor, joined_OK: Tensor, bias_O: Tensor | None, a_RI: Tensor, scale: float, *factors: Tensor
    ) -> Tensor:
        x_BLK = _with_low(x_BLI, a_RI)
        ctx.save_for_backward(x_BLK, joined_OK, a_RI)
        ctx.scale, ctx.dtype, ctx.is_of_samples = scale, factors[0].dtype, factors[0].ndim == 3
        ctx.ranks = [factor.shape[-2] for factor in factors[::2]]
        ctx.widths = [factor.shape[-2] for factor in factors[1::2]]
        return F.linear(x_BLK, joined_OK, bias_O)

    @staticmethod
    def backward(ctx: Any, grad_BLO: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_BLK, joined_OK, a_RI = ctx.saved_tensors
        num_inputs = a_RI.shape[1]
        grad_BLK = grad_BLO @ joined_OK
        low_grad_BLR = grad_BLK[..., num_inputs:]
        x_grad = grad_BLK[..., :num_inputs] + low_grad_BLR @ a_RI if ctx.needs_input_grad[0] else None
        # summed over tokens, and over samples unless each has factors of its own
        grad, low_grad, x = grad_BLO, low_grad_BLR, x_BLK
        if not ctx.is_of_samples:
            grad, low_grad, x = (rows.flatten(0, -2) for rows in (grad, low_grad, x))
        a_grads = (low_grad.mT @ x[..., :num_inputs]).to(ctx.dtype).split(ctx.ranks, dim=-2)
        lows = x[..., num_inputs:].split(ctx.ranks, dim=-1)
        grads = grad.split(ctx.widths, dim=-1)
        b_grads = [ctx.scale * (own.mT @ low).to(ctx.dtype) for own, low in zip(grads, lows, strict=True)]
        return x_grad, None, None, None, None, *chain(*zip(a_grads, b_grads, strict=True))
