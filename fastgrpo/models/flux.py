"""FLUX.1, over diffusers' FluxTransformer2DModel.  https://github.com/black-forest-labs/flux

Latents are packed: 2 x 2 pixels are one token.  After the double-stream blocks, single-stream ones hold image and text
in one sequence and run attention and feed-forward side by side:

    x <- x + g * W [attention(y), gelu(W' y)]           y = norm(x) * (1 + b) + a

Queries and keys are rotated by their token's row and column; text tokens all stand at the origin.  FLUX.1-dev was
distilled with guidance: its scale is an input of the network, and there is no second branch.  FLUX.1-schnell knows no
guidance.
Letters: B samples, L image tokens, M text tokens, N = L + M, C width of a token, E width of a modulation.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from torch.nn import functional as F

from fastgrpo.models.attention import Attention
from fastgrpo.models.blocks.double_stream import double_stream
from fastgrpo.models.blocks.feed_forward import gelu_feed_forward, gelu_projected
from fastgrpo.models.blocks.heads import self_heads
from fastgrpo.models.blocks.modulation import modulated, normed, parts
from fastgrpo.models.blocks.network import BlockNetwork, clipped, times
from fastgrpo.models.blocks.patches import patched, unpatched
from fastgrpo.models.blocks.rotary import Rotation, rotated, rotation
from fastgrpo.models.pipeline_model import PipelineModel
from fastgrpo.models.text_lengths import note_cut
from fastgrpo.types import Conditions, Time

_PATCH = 2


def double_block(
    block: Any,
    x_BLC: Tensor,
    context_BMC: Tensor,
    image_BE: Tensor,
    text_BE: Tensor,
    turns: Rotation,
    attention: Attention,
) -> tuple[Tensor, Tensor]:
    """Image and text tokens after a block that has weights for each."""
    modules = (block.attn, gelu_feed_forward, block.ff, block.ff_context)
    return double_stream(*modules, x_BLC, context_BMC, image_BE, text_BE, turns, None, attention)


def single_block(block: Any, x_BNC: Tensor, modulation_BE: Tensor, turns: Rotation, attention: Attention) -> Tensor:
    """All tokens after a block that has the same weights for text and image."""
    shift, scale, gate = parts(modulation_BE, 3)
    attn, y_BNC = block.attn, modulated(normed(x_BNC), shift, scale)
    q, k, v = self_heads(attn, y_BNC)
    seen_BNC = attention(rotated(q, turns), rotated(k, turns), v).flatten(2)
    hidden = gelu_projected(block.proj_mlp, y_BNC)
    return clipped(x_BNC + gate * block.proj_out(torch.cat([seen_BNC, hidden], dim=2)))


class FluxNetwork(BlockNetwork):
    """guidance_scale: an input of models that were distilled with it."""

    blocks = (double_block, single_block)

    def __init__(self, *, guidance_scale: float, **settings: Any) -> None:
        super().__init__(**settings)
        self._guidance_scale = guidance_scale
        # (text tokens, rows, columns) -> rotation
        self._rotations: dict[tuple[int, int, int], Rotation] = {}

    def modulate(self, transformer: Any, t: Time, pooled_BC: Tensor) -> Iterator[Tensor]:
        """Of each double block's image and text tokens, of each single block, then of the output."""
        # times are rounded to the type of the weights before they are scaled, as diffusers does when it samples
        inputs = [times(t, pooled_BC)]
        if transformer.config.guidance_embeds:
            inputs.append(torch.full_like(inputs[0], self._guidance_scale))
        embedding_BC = F.silu(transformer.time_text_embed(*(1000 * value_B for value_B in inputs), pooled_BC))
        for block in transformer.transformer_blocks:
            yield block.norm1.linear(embedding_BC)
            yield block.norm1_context.linear(embedding_BC)
        for block in transformer.single_transformer_blocks:
            yield block.norm.linear(embedding_BC)
        yield transformer.norm_out.linear(embedding_BC)

    def forward(
        self, transformer: Any, x_BCHW: Tensor, embeds_BMC: Tensor, lengths_B: Tensor, *modulations_BE: Tensor
    ) -> Tensor:
        x_BLC = transformer.x_embedder(patched(x_BCHW.to(embeds_BMC.dtype)))
        context_BMC = transformer.context_embedder(embeds_BMC)
        num_image, (height, width) = x_BLC.shape[1], x_BCHW.shape[-2:]
        turns = self._turns(transformer, context_BMC.shape[1], height // _PATCH, width // _PATCH, x_BCHW.device)
        modulations = iter(modulations_BE)
        for block in transformer.transformer_blocks:
            inputs = (x_BLC, context_BMC, next(modulations), next(modulations), turns)
            x_BLC, context_BMC = self.run(double_block, block, *inputs)
        x_BNC = torch.cat([x_BLC, context_BMC], dim=1)
        for block in transformer.single_transformer_blocks:
            x_BNC = self.run(single_block, block, x_BNC, next(modulations), turns)
        scale, shift = parts(next(modulations), 2)
        return unpatched(transformer.proj_out(modulated(normed(x_BNC[:, :num_image]), shift, scale)), height, width)

    def _turns(self, transformer: Any, num_text: int, rows: int, columns: int, device: torch.device) -> Rotation:
        key = (num_text, rows, columns)
        if key not in self._rotations:
            places_N3 = torch.zeros(rows * columns + num_text, 3, device=device)
            places_N3[: rows * columns, 1] = torch.arange(rows, device=device).repeat_interleave(columns)
            places_N3[: rows * columns, 2] = torch.arange(columns, device=device).repeat(rows)
            self._rotations[key] = rotation(*transformer.pos_embed(places_N3))
        return self._rotations[key]


class Flux(PipelineModel):
    """``FlowModel`` over a FluxPipeline; latents are [B, 16, H, W] as in SD3 and packed inside the network."""

    pipeline_class = FluxPipeline
    transformer_class = FluxTransformer2DModel
    network_class = FluxNetwork
    comfyui_knows = True
    text_encoders = ("text_encoder", "text_encoder_2")
    t5 = ("text_encoder_2", "tokenizer_2")
    takes_negative_prompts = False

    @property
    def has_two_branches(self) -> bool:
        return False

    def check(self, transformer: Mapping[str, Any]) -> None:
        if not self.use_t5:
            raise ValueError("FLUX reads texts through T5; leave out model.use_t5=false")
        if self.guidance_scale != 1 and not transformer.get("guidance_embeds", False):
            raise ValueError(
                f"model.guidance_scale is {self.guidance_scale}, but this transformer was distilled without guidance; "
                "use model.guidance_scale=1"
            )

    @classmethod
    def tokens_of(cls, transformer: Mapping[str, Any]) -> tuple[int, int | None]:
        # positions are turned into angles as they come
        return _PATCH, None

    def text_widths(self, transformer: Mapping[str, Any]) -> tuple[int, int]:
        return transformer["joint_attention_dim"], transformer["pooled_projection_dim"]

    def make_network(self, **settings: Any) -> FluxNetwork:
        return FluxNetwork(guidance_scale=self.guidance_scale, **settings)

    def run_encoders(self, text: str) -> Conditions:
        note_cut(text, self.pipeline.tokenizer_2, self.max_sequence_length)
        embeds_BLC, pooled_BC, _ = self.pipeline.encode_prompt(
            prompt=[text], prompt_2=None, max_sequence_length=self.max_sequence_length
        )
        return Conditions(embeds_BLC, pooled_BC)
