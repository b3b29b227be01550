"""Queries, keys and values of attention, over diffusers' layers.

Letters: B samples, L tokens, M text tokens, C width of a token, H heads, D width of a head.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fastgrpo.models.low_rank import projected


def self_stack(attn: Any) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The layers of queries, keys and values, which read one input."""
    return attn.to_q, attn.to_k, attn.to_v


def added_stack(attn: Any) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The same of the text's tokens, in an attention that has weights for both."""
    return attn.add_q_proj, attn.add_k_proj, attn.add_v_proj


def attention_stacks(transformer: nn.Module) -> Iterator[Sequence[nn.Module]]:
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
