"""What the blocks of multimodal diffusion transformers (SD3, FLUX) are made of, over diffusers' layers.

    modulated(x, shift, scale) = x * (1 + scale) + shift
    feed_forward(x)            = x + gate * W2 gelu(W1 modulated(norm(x), shift, scale))

Letters: B samples, L tokens, H heads, D width of a head, E width of a modulation.  arXiv:2403.03206.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastgrpo.models.gelu_product import frozen_feed_forward, has_epilogues
from fastgrpo.models.low_rank import projected
from fastgrpo.models.sharding import over

_EPS = 1e-6


def run_block(function: Any, checkpointing: bool, block: Any, *inputs: Any) -> Any:
    """``function(block, *inputs)``; with ``checkpointing`` its inputs alone are kept for the backward pass."""
    if checkpointing and torch.is_grad_enabled():
        # weights are gathered around it: they are there when it runs again
        function = partial(checkpoint, function, use_reentrant=False)
    return over(block, function, *inputs)


def self_stack(attn: Any) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The layers of queries, keys and values, which read one input."""
    return attn.to_q, attn.to_k, attn.to_v


def added_stack(attn: Any) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The same of the text's tokens, in an attention that has weights for both."""
    return attn.add_q_proj, attn.add_k_proj, attn.add_v_proj


def attention_stacks(transformer: nn.Module) -> Iterator[tuple[nn.Module, ...]]:
    """Of each attention of a transformer, which ``self_heads`` and ``joint_heads`` run."""
    for module in transformer.modules():
        if hasattr(module, "to_q"):
            yield self_stack(module)
        if getattr(module, "add_q_proj", None) is not None:
            yield added_stack(module)


def heads(qkv: tuple[Tensor, ...], num_heads: int, norm_q: Any, norm_k: Any) -> list[Tensor]:
    """Queries, keys and values as [B, L, H, D], the first two normalized where the model does so."""
    parts_BLHD = [part.unflatten(2, (num_heads, -1)) for part in qkv]
    return [
        part if norm is None else F.rms_norm(part, part.shape[-1:], norm.weight, norm.eps)
        for part, norm in zip(parts_BLHD, (norm_q, norm_k, None), strict=True)
    ]


def self_heads(attn: Any, x_BLC: Tensor) -> list[Tensor]:
    """Queries, keys and values of one sequence."""
    return heads(projected(self_stack(attn), x_BLC), attn.heads, attn.norm_q, attn.norm_k)


def joint_heads(attn: Any, x_BLC: Tensor, context_BMC: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Queries, keys and values, the image's and the text's of each, of an attention that has weights for both."""
    text = projected(added_stack(attn), context_BMC)
    text_heads = heads(text, attn.heads, attn.norm_added_q, attn.norm_added_k)
    return list(zip(self_heads(attn, x_BLC), text_heads, strict=True))


def feed_forward(ff: Any, x_BLC: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
    y_BLC, first, second = modulated(normed(x_BLC), shift, scale), ff.net[0].proj, ff.net[2]
    is_frozen = _is_frozen(first) and _is_frozen(second)
    if torch.is_grad_enabled() and is_frozen and has_epilogues(first, second, y_BLC):
        return x_BLC + gate * frozen_feed_forward(first, second, y_BLC)
    return x_BLC + gate * second(gelu_projected(first, y_BLC))


def _is_frozen(layer: Any) -> bool:
    return type(layer) is nn.Linear and not layer.weight.requires_grad


def gelu_projected(layer: Any, x_BLI: Tensor) -> Tensor:
    """gelu(W x + b) in its tanh form; on a GPU without gradient, the product applies it to what it has summed up."""
    plain = layer if type(layer) is nn.Linear else getattr(layer, "plain", None)
    # PyTorch's operator computes another form on a CPU
    if plain is None or plain.bias is None or torch.is_grad_enabled() or not x_BLI.is_cuda:
        return F.gelu(layer(x_BLI), approximate="tanh")
    rows_MO = torch.ops.aten._addmm_activation(plain.bias, x_BLI.flatten(0, -2), plain.weight.t(), use_gelu=True)
    return rows_MO.unflatten(0, x_BLI.shape[:-1])


def parts(modulation_BE: Tensor, count: int) -> tuple[Tensor, ...]:
    """The shifts, scales and gates [B, 1, C] that one modulation holds."""
    return modulation_BE[:, None].chunk(count, dim=2)


def normed(x_BLC: Tensor) -> Tensor:
    return F.layer_norm(x_BLC, x_BLC.shape[-1:], eps=_EPS)


def modulated(x_BLC: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x_BLC * (1 + scale) + shift
