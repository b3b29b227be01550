"""Linear layers that read the same input as one product, those with a trained low-rank term too.

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
    """A frozen linear layer with a trained low-rank term; ``stack`` computes it."""

    stack: "Projection"
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
        return self.stack(x_BLI)[self.place]

    @property
    def plain(self) -> nn.Linear | None:
        """The linear layer that it is now: the frozen or the merged one, None while it adds its term."""
        return self.base if self.stack.mode.is_off else None

    @torch.no_grad()
    def merge(self) -> None:
        """W <- W + scale * B A, rounded once, to the type of W."""
        weight = self.base.weight
        weight.copy_(torch.addmm(weight.to(self.lora_A.dtype), self.lora_B, self.lora_A, alpha=self.scale))


def projected(layers: Sequence[nn.Module], x_BLI: Tensor) -> tuple[Tensor, ...]:
    """What each of some layers makes of one input: by one product where they are stacked."""
    stack = getattr(layers[0], "stack", None)
    if stack is not None and len(stack.widths) == len(layers):
        return stack(x_BLI)
    return tuple(layer(x_BLI) for layer in layers)


class Stack:
    """Frozen linear layers of one input, as one product: their weights become views of one tensor.

    ``extra`` columns beside the weights are zeros.  Whoever gives a layer another weight takes it out of the product.
    """

    def __init__(self, bases: Sequence[nn.Linear], extra: int = 0) -> None:
        self.widths = [base.out_features for base in bases]
        weight, biases = bases[0].weight, [base.bias for base in bases]
        self._num_inputs = bases[0].in_features
        self._joined_OK = weight.new_zeros(sum(self.widths), self._num_inputs + extra, requires_grad=False)
        self._weight_OI = self._joined_OK[:, : self._num_inputs]
        self._bias_O = None if biases[0] is None else torch.cat([bias.detach() for bias in biases])
        for base, rows_OI in zip(bases, self._weight_OI.split(self.widths), strict=True):
            rows_OI.copy_(base.weight.detach())
            base.weight = nn.Parameter(rows_OI, requires_grad=False)

    def __call__(self, x_BLI: Tensor) -> tuple[Tensor, ...]:
        """The outputs [B, L, O of the layer] of the layers, views of one tensor."""
        return F.linear(x_BLI, self._weight_OI, self._bias_O).split(self.widths, dim=-1)


def stack_frozen(layers: Sequence[nn.Linear]) -> None:
    """Stack layers that nobody trains."""
    stack = Stack(layers)
    for place, layer in enumerate(layers):
        layer.__dict__ |= {"stack": stack, "place": place}


def unstack(module: nn.Module) -> None:
    """Give each linear layer whose weight is a view memory of its own again."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear) and layer.weight.untyped_storage().nbytes() > layer.weight.nbytes:
            layer.__dict__.pop("stack", None)
            layer.__dict__.pop("place", None)
            layer.weight = nn.Parameter(layer.weight.detach().clone(memory_format=torch.contiguous_format), False)


class Projection(Stack):
    """The same of adapted layers, with their terms."""

    def __init__(self, layers: Sequence[LoRALinear], mode: Mode) -> None:
        self.layers = list(layers)
        self.mode = mode
        self._ranks = [len(layer.lora_A) for layer in layers]
        bases, num_ranks = [layer.base for layer in layers], sum(self._ranks)
        # the fast kernels want rows of whole 16 bytes
        multiple = max(1, 16 // bases[0].weight.itemsize)
        extra = num_ranks + -(bases[0].in_features + num_ranks) % multiple
        super().__init__(bases, extra=extra)
        self._a_RI = self._weight_OI.new_zeros(extra, self._num_inputs)
        # of the factors, when they were copied
        self._version = -1
        for place, layer in enumerate(layers):
            layer.stack, layer.place = self, place

    def __call__(self, x_BLI: Tensor) -> tuple[Tensor, ...]:
        # compiled code cannot look at versions: who runs it has called refresh
        if not torch.compiler.is_compiling():
            refresh([self])
        if self.mode.is_off:
            return super().__call__(x_BLI)
        if x_BLI.ndim != 3:
            rows_1MI = x_BLI.reshape(1, -1, x_BLI.shape[-1])
            return tuple(part.reshape(*x_BLI.shape[:-1], part.shape[-1]) for part in self(rows_1MI))
        if torch.is_grad_enabled():
            assert self.mode.gain_B is None, "the reference is computed without gradient"
            factors = chain(*(layer.factors for layer in self.layers))
            y_BLO = _Product.apply(x_BLI, self._joined_OK, self._bias_O, self._a_RI, self.layers[0].scale, *factors)
        else:
            _, x_BLK = _terms(x_BLI, self._a_RI, self.mode.gain_B)
            y_BLO = F.linear(x_BLK, self._joined_OK, self._bias_O)
        return y_BLO.split(self.widths, dim=-1)

    @property
    def version(self) -> int:
        """Counts whatever changes a factor in place."""
        return sum(factor._version for layer in self.layers for factor in (layer.lora_A, layer.lora_B))

    @property
    def is_stale(self) -> bool:
        return self._version != self.version

    def places(self) -> tuple[list[Tensor], list[Tensor]]:
        """Where the copies of A and of s B are, of each part."""
        num_ranks = sum(self._ranks)
        columns_OR = self._joined_OK[:, self._num_inputs : self._num_inputs + num_ranks].split(self._ranks, dim=1)
        places_OR = [own_OR.split(self.widths)[place] for place, own_OR in enumerate(columns_OR)]
        return list(self._a_RI[:num_ranks].split(self._ranks)), places_OR

    def check(self) -> None:
        """RuntimeError if a weight of a base is no longer where products read it."""
        storage = self._joined_OK.untyped_storage()._cdata
        if any(layer.base.weight.untyped_storage()._cdata != storage for layer in self.layers):
            raise RuntimeError(
                "a frozen weight was replaced after adapters were installed, by a copy of the transformer, .to() or "
                "load_state_dict(assign=True); load weights first, and install adapters last"
            )


@torch.no_grad()
def refresh(projections: Iterable[Projection]) -> None:
    """Copy the factors that have changed: in place, by anything that counts their version up."""
    stale = [projection for projection in projections if projection.is_stale]
    if not stale:
        return
    versions = [projection.version for projection in stale]
    layers = [layer for projection in stale for layer in projection.layers]
    places = [projection.places() for projection in stale]
    torch._foreach_copy_([place for own, _ in places for place in own], [layer.lora_A for layer in layers])
    scaled = torch._foreach_mul([layer.lora_B for layer in layers], [layer.scale for layer in layers])
    torch._foreach_copy_([place for _, own in places for place in own], list(scaled))
    # now that there was memory for it
    for projection, version in zip(stale, versions, strict=True):
        projection._version = version


def _terms(x_BLI: Tensor, a_RI: Tensor, gain_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(gain A x, [x, gain A x] in one tensor)."""
    low_BLR = F.linear(x_BLI, a_RI)
    if gain_B is not None:
        low_BLR = low_BLR * gain_B.to(low_BLR.dtype)[:, None, None]
    return low_BLR, torch.cat([x_BLI, low_BLR], dim=-1)


class _Product(torch.autograd.Function):
    """y = [W, s B] [x, A x] + b, whose gradient goes to x and to the factors (A_1, B_1, A_2, B_2, ...) themselves.

    Its own derivative is not that of the product: a gradient is not to be differentiated again.
    """

    @staticmethod
    def forward(
        ctx: Any, x_BLI: Tensor, joined_OK: Tensor, bias_O: Tensor | None, a_RI: Tensor, scale: float, *factors: Tensor
    ) -> Tensor:
        low_BLR, x_BLK = _terms(x_BLI, a_RI)
        # not what they are in one tensor, since attention keeps its output, which is x, as well
        ctx.save_for_backward(x_BLI, low_BLR, joined_OK, a_RI)
        ctx.scale, ctx.dtype, ctx.is_of_samples = scale, factors[0].dtype, factors[0].ndim == 3
        ctx.ranks = [factor.shape[-2] for factor in factors[::2]]
        ctx.widths = [factor.shape[-2] for factor in factors[1::2]]
        return F.linear(x_BLK, joined_OK, bias_O)

    @staticmethod
    def backward(ctx: Any, grad_BLO: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_BLI, low_BLR, joined_OK, a_RI = ctx.saved_tensors
        num_inputs = a_RI.shape[1]
        grad_BLK = grad_BLO @ joined_OK
        low_grad_BLR = grad_BLK[..., num_inputs:]
        x_grad = grad_BLK[..., :num_inputs] + low_grad_BLR @ a_RI if ctx.needs_input_grad[0] else None
        # of each sample: x may be a part of a longer sequence, whose rows are not one matrix
        a_grads = [(low_grad_BLR.mT @ x_BLI).to(ctx.dtype)]
        num_ranks = sum(ctx.ranks)
        own_lows = low_BLR[..., :num_ranks].split(ctx.ranks, dim=-1)
        parts = zip(grad_BLO.split(ctx.widths, dim=-1), own_lows, strict=True)
        b_grads = [ctx.scale * (own_BLO.mT @ own_BLR).to(ctx.dtype) for own_BLO, own_BLR in parts]
        if not ctx.is_of_samples:
            a_grads, b_grads = ([gradient.sum(dim=0) for gradient in gradients] for gradients in (a_grads, b_grads))
        factors = chain(*zip(a_grads[0][..., :num_ranks, :].split(ctx.ranks, dim=-2), b_grads, strict=True))
        return x_grad, None, None, None, None, *factors
