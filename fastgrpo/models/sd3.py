"""Stable Diffusion 3 and 3.5: MM-DiT, over diffusers' SD3Transformer2DModel.  arXiv:2403.03206.

    a, b, g = modulation(t, pooled text)          of image and text tokens of each block, linear in silu(embedding)
    x <- x + g1 * attention(norm(x) * (1 + b1) + a1)         image and text tokens attend together
    x <- x + g2 * feed_forward(norm(x) * (1 + b2) + a2)

Some blocks of SD3.5-medium let the image attend to itself once more.  The embedded model is of this family too, so what
trains on a laptop is the code that trains SD3.5.
Letters: B samples, L image tokens, M text tokens, C width of a token, E width of a modulation.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor
from torch.nn import functional as F

from fastgrpo.models.attention import Attention
from fastgrpo.models.blocks.feed_forward import gelu_feed_forward
from fastgrpo.models.blocks.heads import joint_heads, self_heads
from fastgrpo.models.blocks.modulation import modulated, normed, parts
from fastgrpo.models.blocks.network import BlockNetwork, exact_times
from fastgrpo.models.blocks.patches import unpatched
from fastgrpo.models.pipeline_model import PipelineModel
from fastgrpo.models.text_lengths import note_cut
from fastgrpo.types import Conditions, Time

# tokens of CLIP, before those of T5
_CLIP_TOKENS = 77


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
    x_BLC = _fed_forward(block.ff, x_BLC, *rest[:3])
    if block.context_pre_only:
        return x_BLC, None
    assert seen_BMC is not None
    return x_BLC, _fed_forward(block.ff_context, context_BMC + text_gate * seen_BMC, *text_rest)


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
    seen_BLC: Tensor = attn.to_out[0](attention(q, k, v).flatten(2))
    return seen_BLC


def _fed_forward(ff: Any, x_BLC: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
    return x_BLC + gate * gelu_feed_forward(ff, modulated(normed(x_BLC), shift, scale))


class SD3Network(BlockNetwork):
    blocks = (joint_block,)

    def modulate(self, transformer: Any, t: Time, pooled_BC: Tensor) -> Iterator[Tensor]:
        """Of each block's image and text tokens, then of the output."""
        embedding_BC = F.silu(transformer.time_text_embed(1000 * exact_times(t, pooled_BC), pooled_BC))
        for block in transformer.transformer_blocks:
            yield block.norm1.linear(embedding_BC)
            yield block.norm1_context.linear(embedding_BC)
        yield transformer.norm_out.linear(embedding_BC)

    def forward(
        self, transformer: Any, x_BCHW: Tensor, embeds_BMC: Tensor, lengths_B: Tensor, *modulations_BE: Tensor
    ) -> Tensor:
        x_BLC = transformer.pos_embed(x_BCHW.to(embeds_BMC.dtype)).contiguous()
        context_BMC = transformer.context_embedder(embeds_BMC)
        modulations = iter(modulations_BE)
        for block in transformer.transformer_blocks:
            x_BLC, context_BMC = self.run(joint_block, block, x_BLC, context_BMC, next(modulations), next(modulations))
        scale, shift = parts(next(modulations), 2)
        x_BLC = transformer.proj_out(modulated(normed(x_BLC), shift, scale))
        height, width = x_BCHW.shape[-2:]
        return unpatched(x_BLC, height, width, transformer.config.patch_size, channels_last=True)


class StableDiffusion3(PipelineModel):
    """``FlowModel`` over a StableDiffusion3Pipeline; without T5, zeros are in the place of its embeddings."""

    pipeline_class = StableDiffusion3Pipeline
    transformer_class = SD3Transformer2DModel
    network_class = SD3Network
    comfyui_knows = True
    text_encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    # without T5
    shortest_text = 0
    t5 = ("text_encoder_3", "tokenizer_3")

    @classmethod
    def tokens_of(cls, transformer: Mapping[str, Any]) -> tuple[int, int | None]:
        return int(transformer.get("patch_size", 2)), int(transformer.get("pos_embed_max_size", 96))

    def text_widths(self, transformer: Mapping[str, Any]) -> tuple[int, int]:
        return transformer["joint_attention_dim"], transformer["pooled_projection_dim"]

    def num_text_tokens(self, text: str) -> int:
        return _CLIP_TOKENS + self.max_sequence_length

    def run_encoders(self, text: str) -> Conditions:
        if self.use_t5:
            note_cut(text, self.pipeline.tokenizer_3, self.max_sequence_length)
        else:
            note_cut(text, self.pipeline.tokenizer, self.pipeline.tokenizer.model_max_length)
        embeds_BLC, _, pooled_BC, _ = self.pipeline.encode_prompt(
            prompt=[text],
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return Conditions(embeds_BLC, pooled_BC)
