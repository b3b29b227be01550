"""Linear layers whose products are of 8-bit floats (e4m3): for sampling where no log_prob is taken.

    y[m, o] = s_x[m] s_w[o] sum over i of x8[m, i] w8[o, i] + bias[o]            rounded to bfloat16
    s[r] = max over i of |a[r, i]| / 448          a8 = a / s rounded to e4m3, whose largest value is 448

One scale for each token and one for each output, as torch._scaled_mm takes them on Hopper, Ada and Blackwell.
Letters: B samples, L tokens, M = B * L rows, I inputs, O outputs.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastgrpo.models.blocks.layout import blocks_of, modulators
from fastgrpo.models.low_rank import LoRALinear

_LARGEST = torch.finfo(torch.float8_e4m3fn).max
# torch._scaled_mm takes no other widths
_MULTIPLE = 16


@dataclass(frozen=True, kw_only=True)
class Fp8:
    """Run the linear layers of a transformer's blocks in fp8; embeddings, modulations and the output stay as they are.

    It costs a byte of memory a weight.  On a CPU the same is computed in float32, to measure drift and not for speed.
    """

    def __call__(self, transformer: nn.Module) -> Callable[[], AbstractContextManager[None]]:
        """ValueError if the device cannot multiply fp8, or if no layer is wide enough."""
        _try_out(next(transformer.parameters()).device)
        layers = [_Swap(parent, name, linear) for parent, name, linear in block_layers(transformer)]
        _stack([swap for swap in layers if hasattr(swap.exact, "stack")])
        if not layers:
            raise ValueError(
                f"lossy=fp8 found no linear layer in the transformer's blocks with widths that {_MULTIPLE} divides; "
                "use lossy=none"
            )
        return _Fp8Layers(layers)


class Fp8Linear(nn.Module):
    """A linear layer in fp8; ``quantize`` takes its weights anew, into the same memory."""

    weight_OI: Tensor
    scale_O: Tensor
    bias: Tensor | None
    stack: "Fp8Stack"

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight
        self.register_buffer("weight_OI", torch.empty_like(weight, dtype=torch.float8_e4m3fn, requires_grad=False))
        self.register_buffer("scale_O", torch.empty(len(weight), device=weight.device))
        bias = None if linear.bias is None else torch.empty_like(linear.bias, dtype=torch.bfloat16, requires_grad=False)
        self.register_buffer("bias", bias)

    @torch.no_grad()
    def quantize(self, linear: nn.Linear) -> None:
        weight_OI, scale_O = quantize_rows(linear.weight)
        self.weight_OI.copy_(weight_OI)
        self.scale_O.copy_(scale_O)
        if self.bias is not None:
            self.bias.copy_(linear.bias)

    def forward(self, x_BLC: Tensor) -> Tensor:
        return fp8_linear(x_BLC, self.weight_OI, self.scale_O, self.bias)


class Fp8Stack:
    """Layers of one input as one product, as ``low_rank.Stack`` is in full precision: the input is rounded once."""

    def __init__(self, layers: Sequence[Fp8Linear]) -> None:
        self.widths = [len(layer.scale_O) for layer in layers]
        self._weight_OI = torch.cat([layer.weight_OI for layer in layers])
        self._scale_O = torch.cat([layer.scale_O for layer in layers])
        biases = [layer.bias for layer in layers if layer.bias is not None]
        self._bias_O = torch.cat(biases) if biases else None
        for name, joined in (("weight_OI", self._weight_OI), ("scale_O", self._scale_O), ("bias", self._bias_O)):
            for layer, rows in zip(layers, joined.split(self.widths) if joined is not None else (), strict=False):
                setattr(layer, name, rows)
        for layer in layers:
            layer.stack = self

    def __call__(self, x_BLI: Tensor) -> tuple[Tensor, ...]:
        y_BLO = fp8_linear(x_BLI, self._weight_OI, self._scale_O, self._bias_O)
        return y_BLO.split(self.widths, dim=-1)


def fp8_linear(x_BLI: Tensor, weight_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None) -> Tensor:
    """[..., I] -> [..., O] in the type of x, over weights [O, I] of e4m3 and their float32 scales [O]."""
    x_MI, scale_M = quantize_rows(x_BLI.flatten(0, -2))
    multiply = _scaled_mm if x_BLI.is_cuda else fp8_product_reference
    return multiply(x_MI, scale_M, weight_OI, scale_O, bias_O).to(x_BLI.dtype).unflatten(0, x_BLI.shape[:-1])


def quantize_rows(a_RI: Tensor) -> tuple[Tensor, Tensor]:
    """a [R, I] as e4m3 and one float32 scale [R] for each row; a row with a NaN or infinity becomes NaN."""
    largest_R = a_RI.abs().amax(dim=1).float()
    # a row of zeros has any scale
    scale_R = torch.where(largest_R > 0, largest_R / _LARGEST, 1.0)
    return (a_RI.float() / scale_R[:, None]).to(torch.float8_e4m3fn), scale_R


def fp8_product_reference(
    x_MI: Tensor, scale_M: Tensor, weight_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None
) -> Tensor:
    """The product on the CPU, and what the tests compare the kernel with: bfloat16 [M, O]."""
    y_MO = x_MI.float() @ weight_OI.float().t() * scale_M[:, None] * scale_O
    return (y_MO if bias_O is None else y_MO + bias_O.float()).to(torch.bfloat16)


def _scaled_mm(x_MI: Tensor, scale_M: Tensor, weight_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None) -> Tensor:
    # with scales by row it gives no type but bfloat16.  Fast accumulation is what Hopper's speed in fp8 needs
    return torch._scaled_mm(
        x_MI, weight_OI.t(), scale_M[:, None], scale_O[None], bias_O, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def block_layers(transformer: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """(parent, name in it, linear layer) of the blocks' layers that run in fp8; an adapter's layer is its base."""
    for _, block in blocks_of(transformer):
        skipped = set(modulators(block))
        for parent in list(block.modules()):
            if isinstance(parent, LoRALinear):
                continue
            for name, child in parent.named_children():
                linear = child.base if isinstance(child, LoRALinear) else child
                if not isinstance(linear, nn.Linear) or linear in skipped:
                    continue
                if not any(width % _MULTIPLE for width in linear.weight.shape):
                    yield parent, name, linear


class _Swap:
    """A place in the transformer, and the two layers that take turns there."""

    def __init__(self, parent: nn.Module, name: str, linear: nn.Linear) -> None:
        self.parent = parent
        self.name = name
        self.linear = linear
        self.exact = getattr(parent, name)
        self.fp8 = Fp8Linear(linear)


def _stack(swaps: list[_Swap]) -> None:
    """What is one product in full precision is one here, if all of it is in fp8."""
    stacks: dict[int, list[_Swap]] = {}
    for swap in swaps:
        stacks.setdefault(id(swap.exact.stack), []).append(swap)
    for group in stacks.values():
        if len(group) == len(group[0].exact.stack.widths) > 1:
            Fp8Stack([swap.fp8 for swap in sorted(group, key=lambda swap: swap.exact.place)])


class _Fp8Layers:
    """() -> a context in which the layers are in fp8, with the weights that they had when it was entered."""

    def __init__(self, layers: list[_Swap]) -> None:
        self._layers = layers

    @contextmanager
    def __call__(self) -> Iterator[None]:
        for swap in self._layers:
            swap.fp8.quantize(swap.linear)
            setattr(swap.parent, swap.name, swap.fp8)
        try:
            yield
        finally:
            for swap in self._layers:
                setattr(swap.parent, swap.name, swap.exact)


def _try_out(device: torch.device) -> None:
    """One small product by the kernel: the machine knows best what it can do."""
    if device.type != "cuda":
        return
    ones = torch.ones(_MULTIPLE, device=device)
    eights = torch.ones(_MULTIPLE, _MULTIPLE, device=device).to(torch.float8_e4m3fn)
    try:
        _scaled_mm(eights, ones, eights, ones, ones.bfloat16())
    except RuntimeError as error:
        name = torch.cuda.get_device_name(device)
        raise ValueError(
            f"lossy=fp8 needs a GPU that multiplies fp8 with scales by row (Ada, Hopper, Blackwell); {name} says: "
            f"{str(error).splitlines()[0]}; use lossy=none"
        ) from error
