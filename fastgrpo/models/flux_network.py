"""The forward pass of FLUX.1's transformer over the weights of diffusers' FluxTransformer2DModel.

Latents are packed: 2 x 2 pixels are one token.  Double-stream blocks are SD3's, with weights of their own for text and
image; single-stream blocks hold text and image in one sequence and run attention and feed-forward side by side:

    x <- x + g * W [attention(y), gelu(W' y)]           y = norm(x) * (1 + b) + a

Queries and keys are rotated by their token's row and column (arXiv:2104.09864); text tokens all stand at the origin.
Guidance is an input of the modulations in a model that was distilled with it.  Each kind of block is one function,
compiled once.  https://github.com/black-forest-labs/flux
Letters: B samples, L image tokens, M text tokens, N = M + L, H heads, D width of a head, C width of a token.
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
    gelu_projected,
    joint_heads,
    modulated,
    normed,
    parts,
    run_block,
    self_heads,
)
from fastgrpo.models.modulation import Modulations
from fastgrpo.types import Conditions, Time

PATCH = 2

# cosines and sines [N, D] of the angles that pairs of channels are rotated by, each pair's first sine negated
Rotation = tuple[Tensor, Tensor]


class FluxNetwork:
    """(transformer, x [B, C, H, W], t, conditions) -> v [B, C, H, W] in the type of the conditions."""

    def __init__(
        self,
        *,
        guidance_scale: float,
        attention: Attention,
        compile: Callable[[Any], Any],
        checkpointing: bool,
        modulations: Modulations,
    ) -> None:
        self._guidance_scale = guidance_scale
        self._attention = attention
        self._double_block = compile(double_block)
        self._single_block = compile(single_block)
        self._checkpointing = checkpointing
        self._modulations = modulations
        # (text tokens, rows, columns) -> rotation
        self._rotations: dict[tuple[int, int, int], Rotation] = {}

    def __call__(self, transformer: Any, x_BCHW: Tensor, t: Time, conditions: Conditions) -> Tensor:
        modulations = self.modulations(transformer, t, conditions)
        return self.forward(transformer, x_BCHW, conditions.embeds_BLC, *modulations)

    def stacks(self, transformer: Any) -> Iterator[Sequence[nn.Module]]:
        return attention_stacks(transformer)

    def modulations(self, transformer: Any, t: Time, conditions: Conditions) -> Iterator[Tensor]:
        return self._modulations(transformer, t, conditions, self._modulate)

    def forward(self, transformer: Any, x_BCHW: Tensor, embeds_BMC: Tensor, *modulations_BE: Tensor) -> Tensor:
        """What remains when the modulations are known: a function of tensors."""
        x_BLC = transformer.x_embedder(_pack(x_BCHW.to(embeds_BMC.dtype)))
        context_BMC = transformer.context_embedder(embeds_BMC)
        num_text, (height, width) = context_BMC.shape[1], x_BCHW.shape[-2:]
        rotation = self._rotation(transformer, num_text, height // PATCH, width // PATCH, x_BCHW.device)
        modulations = iter(modulations_BE)
        for block in transformer.transformer_blocks:
            inputs = (block, x_BLC, context_BMC, next(modulations), next(modulations), rotation, self._attention)
            x_BLC, context_BMC = run_block(self._double_block, self._checkpointing, *inputs)
        x_BNC = torch.cat([context_BMC, x_BLC], dim=1)
        for block in transformer.single_transformer_blocks:
            single_inputs = (block, x_BNC, next(modulations), rotation, self._attention)
            x_BNC = run_block(self._single_block, self._checkpointing, *single_inputs)
        scale, shift = parts(next(modulations), 2)
        return _unpack(transformer.proj_out(modulated(normed(x_BNC[:, num_text:]), shift, scale)), height, width)

    def _modulate(self, transformer: Any, t: Time, pooled_BC: Tensor) -> Iterator[Tensor]:
        """Modulations of each double block's image and text tokens, of each single block, then of the output."""
        # times are rounded to the type of the weights before they are scaled, as diffusers does when it samples
        inputs = [t.to(pooled_BC.dtype) if isinstance(t, Tensor) else pooled_BC.new_full((len(pooled_BC),), t)]
        if transformer.config.guidance_embeds:
            inputs.append(torch.full_like(inputs[0], self._guidance_scale))
        embedding_BC = F.silu(transformer.time_text_embed(*(1000 * value_B for value_B in inputs), pooled_BC))
        for block in transformer.transformer_blocks:
            yield block.norm1.linear(embedding_BC)
            yield block.norm1_context.linear(embedding_BC)
        for block in transformer.single_transformer_blocks:
            yield block.norm.linear(embedding_BC)
        yield transformer.norm_out.linear(embedding_BC)

    def _rotation(self, transformer: Any, num_text: int, rows: int, columns: int, device: torch.device) -> Rotation:
        key = (num_text, rows, columns)
        if key not in self._rotations:
            places_N3 = torch.zeros(num_text + rows * columns, 3, device=device)
            places_N3[num_text:, 1] = torch.arange(rows, device=device).repeat_interleave(columns)
            places_N3[num_text:, 2] = torch.arange(columns, device=device).repeat(rows)
            cos_ND, sin_ND = transformer.pos_embed(places_N3)
            self._rotations[key] = cos_ND, torch.stack([-sin_ND[:, ::2], sin_ND[:, 1::2]], dim=2).flatten(1)
        return self._rotations[key]


def double_block(
    block: Any,
    x_BLC: Tensor,
    context_BMC: Tensor,
    image_BE: Tensor,
    text_BE: Tensor,
    rotation: Rotation,
    attention: Attention,
) -> tuple[Tensor, Tensor]:
    """Image and text tokens after a block that has weights for each."""
    shift, scale, gate, *rest = parts(image_BE, 6)
    text_shift, text_scale, text_gate, *text_rest = parts(text_BE, 6)
    attn, y_BLC = block.attn, modulated(normed(x_BLC), shift, scale)
    text_BMC = modulated(normed(context_BMC), text_shift, text_scale)
    q, k, v = (torch.cat([text, image], dim=1) for image, text in joint_heads(attn, y_BLC, text_BMC))
    seen_BNC = attention(_rotated(q, rotation), _rotated(k, rotation), v).flatten(2)
    num_text = context_BMC.shape[1]
    x_BLC = x_BLC + gate * attn.to_out[0](seen_BNC[:, num_text:])
    context_BMC = context_BMC + text_gate * attn.to_add_out(seen_BNC[:, :num_text])
    return (
        feed_forward(block.ff, x_BLC, *rest),
        _clipped(feed_forward(block.ff_context, context_BMC, *text_rest)),
    )


def single_block(block: Any, x_BNC: Tensor, modulation_BE: Tensor, rotation: Rotation, attention: Attention) -> Tensor:
    """All tokens after a block that has the same weights for text and image."""
    shift, scale, gate = parts(modulation_BE, 3)
    attn, y_BNC = block.attn, modulated(normed(x_BNC), shift, scale)
    q, k, v = self_heads(attn, y_BNC)
    seen_BNC = attention(_rotated(q, rotation), _rotated(k, rotation), v).flatten(2)
    hidden = gelu_projected(block.proj_mlp, y_BNC)
    return _clipped(x_BNC + gate * block.proj_out(torch.cat([seen_BNC, hidden], dim=2)))


def _rotated(x_BNHD: Tensor, rotation: Rotation) -> Tensor:
    """Each pair of neighbouring channels turned by its token's angle."""
    cos_N1D, sin_N1D = (part_ND[:, None] for part_ND in rotation)
    exact_BNHD = x_BNHD.to(torch.promote_types(x_BNHD.dtype, torch.float32))
    # the sines have the signs: swapping is no tensor of its own once it is compiled, concatenating would be
    swapped_BNHD = exact_BNHD.unflatten(3, (-1, 2)).flip(4).flatten(3)
    return (exact_BNHD * cos_N1D + swapped_BNHD * sin_N1D).to(x_BNHD.dtype)


def _clipped(x: Tensor) -> Tensor:
    # FLUX's activations leave the range of float16
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def _pack(x_BCHW: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, (H / 2) (W / 2), C 2 2]."""
    x = x_BCHW.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _unpack(x_BLC: Tensor, height: int, width: int) -> Tensor:
    """[B, (H / 2) (W / 2), C 2 2] -> [B, C, H, W]."""
    x = x_BLC.unflatten(2, (-1, PATCH, PATCH)).unflatten(1, (height // PATCH, width // PATCH))
    return x.permute(0, 3, 1, 4, 2, 5).reshape(len(x), -1, height, width)
