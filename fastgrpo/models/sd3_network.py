"""The forward pass of Stable Diffusion 3's transformer (MM-DiT), over the weights of diffusers' SD3Transformer2DModel.

    a, b, g = modulation(t, pooled text)          of image and text tokens of each block, linear in silu(embedding)
    x <- x + g1 * attention(norm(x) * (1 + b1) + a1)         image and text tokens attend together
    x <- x + g2 * feed_forward(norm(x) * (1 + b2) + a2)

Some blocks of SD3.5-medium let the image attend to itself once more.  Ours rather than diffusers', so that the repeated
block is one function, which is compiled once and checkpointed, attention is chosen in one place, and modulations of a
frozen transformer are computed once a (t, prompt).  arXiv:2403.03206.
Letters: B samples, L image tokens, M text tokens, H heads, D width of a head, C width of a token, E of a modulation.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgrpo.models.attention import Attention
from fastgrpo.models.mmdit import (
    attention_stacks,
    feed_forward,
    joint_heads,
    modulated,
    normed,
    parts,
    run_block,
    self_heads,
)
from fastgrpo.models.modulation import Modulations
from fastgrpo.types import Conditions, Time


class SD3Network:
    """(transformer, x [B, C, H, W], t, conditions) -> v [B, C, H, W] in the type of the conditions."""

    def __init__(
        self, *, attention: Attention, compile: Callable[[Any], Any], checkpointing: bool, modulations: Modulations
    ) -> None:
        self._attention = attention
        self._block = compile(joint_block)
        self._checkpointing = checkpointing
        self._modulations = modulations

    def __call__(self, transformer: Any, x_BCHW: Tensor, t: Time, conditions: Conditions) -> Tensor:
        modulations = self.modulations(transformer, t, conditions)
        return self.forward(transformer, x_BCHW, conditions.embeds_BLC, *modulations)

    def stacks(self, transformer: Any) -> Iterator[Sequence[nn.Module]]:
        return attention_stacks(transformer)

    def modulations(self, transformer: Any, t: Time, conditions: Conditions) -> Iterator[Tensor]:
        return self._modulations(transformer, t, conditions, modulate)

    def forward(self, transformer: Any, x_BCHW: Tensor, embeds_BMC: Tensor, *modulations_BE: Tensor) -> Tensor:
        """What remains when the modulations are known: a function of tensors."""
        x_BLC = transformer.pos_embed(x_BCHW.to(embeds_BMC.dtype)).contiguous()
        context_BMC = transformer.context_embedder(embeds_BMC)
        modulations = iter(modulations_BE)
        for block in transformer.transformer_blocks:
            inputs = (block, x_BLC, context_BMC, next(modulations), next(modulations), self._attention)
            x_BLC, context_BMC = run_block(self._block, self._checkpointing, *inputs)
        scale, shift = parts(next(modulations), 2)
        x_BLC = transformer.proj_out(modulated(normed(x_BLC), shift, scale))
        return _unpatchify(x_BLC, x_BCHW.shape[-2:], transformer.config.patch_size)


def modulate(transformer: Any, t: Time, pooled_BC: Tensor) -> Iterator[Tensor]:
    """Modulations [B, E] of each block's image and text tokens, then of the output."""
    timestep_B = 1000 * t if isinstance(t, Tensor) else torch.full((len(pooled_BC),), 1000 * t, device=pooled_BC.device)
    embedding_BC = F.silu(transformer.time_text_embed(timestep_B, pooled_BC))
    for block in transformer.transformer_blocks:
        yield block.norm1.linear(embedding_BC)
        yield block.norm1_context.linear(embedding_BC)
    yield transformer.norm_out.linear(embedding_BC)


def joint_block(
    block: Any, x_BLC: Tensor, context_BMC: Tensor, image_BE: Tensor, text_BE: Tensor, attention: Attention
) -> tuple[Tensor, Tensor | None]:
    """One block: image and text tokens after it, the latter None after the last block."""
    shift, scale, gate, *rest = parts(image_BE, 9 if block.use_dual_attention else 6)
    normed_BLC = normed(x_BLC)
    if block.context_pre_only:
        text_scale, text_shift = parts(text_BE, 2)
    else:
        text_shift, text_scale, text_gate, *text_rest = parts(text_BE, 6)
    seen_BLC, seen_BMC = _joint_attention(
        block.attn,
        modulated(normed_BLC, shift, scale),
        modulated(normed(context_BMC), text_shift, text_scale),
        attention,
    )
    x_BLC = x_BLC + gate * seen_BLC
    if block.use_dual_attention:
        shift, scale, gate = rest[3:]
        x_BLC = x_BLC + gate * _self_attention(block.attn2, modulated(normed_BLC, shift, scale), attention)
    x_BLC = feed_forward(block.ff, x_BLC, *rest[:3])
    if block.context_pre_only:
        return x_BLC, None
    assert seen_BMC is not None
    return x_BLC, feed_forward(block.ff_context, context_BMC + text_gate * seen_BMC, *text_rest)


def _joint_attention(
    attn: Any, x_BLC: Tensor, context_BMC: Tensor, attention: Attention
) -> tuple[Tensor, Tensor | None]:
    q, k, v = (torch.cat([image, text], dim=1) for image, text in joint_heads(attn, x_BLC, context_BMC))
    seen_BNC = attention(q, k, v).flatten(2)
    num_image = x_BLC.shape[1]
    seen_BLC = attn.to_out[0](seen_BNC[:, :num_image])
    return seen_BLC, None if attn.context_pre_only else attn.to_add_out(seen_BNC[:, num_image:])


def _self_attention(attn: Any, x_BLC: Tensor, attention: Attention) -> Tensor:
    q, k, v = self_heads(attn, x_BLC)
    return attn.to_out[0](attention(q, k, v).flatten(2))


def _unpatchify(x_BLC: Tensor, size: torch.Size, patch: int) -> Tensor:
    """[B, (H / p) (W / p), p p C] -> [B, C, H, W]."""
    height, width = (side // patch for side in size)
    x = x_BLC.unflatten(2, (patch, patch, -1)).unflatten(1, (height, width))
    return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, *size)
