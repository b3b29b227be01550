"""FLUX.2 klein, over diffusers' Flux2Transformer2DModel.  https://github.com/black-forest-labs/flux2

A pixel of a latent is a token: the autoencoder's 2 x 2 pixels are channels of one, normalized by statistics that it was
trained with.  Double-stream blocks have a SwiGLU feed-forward.  Single-stream blocks hold image and text in one
sequence and run attention and feed-forward side by side, between two products:

    q, k, v, a, b = W y                                 y = norm(x) * (1 + b) + a
    x <- x + g * W' [attention(q, k, v), silu(a) * b]

All blocks of a kind share one modulation, which depends on time alone.  Queries and keys are rotated by four places of
their token: image tokens have a row and a column, text tokens their number.  Texts are filled up to
``max_sequence_length`` tokens, and what fills them up is attended to, as the model was trained.
Letters: B samples, L image tokens, M text tokens, N = L + M, C width of a token, E width of a modulation.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from torch import Tensor
from torch.nn import functional as F

from fastgrpo.models.attention import Attention
from fastgrpo.models.blocks.double_stream import double_stream
from fastgrpo.models.blocks.feed_forward import fused_swiglu_feed_forward, swiglu
from fastgrpo.models.blocks.heads import heads
from fastgrpo.models.blocks.modulation import modulated, normed, parts
from fastgrpo.models.blocks.network import BlockNetwork, clipped, times
from fastgrpo.models.blocks.patches import patched, unpatched
from fastgrpo.models.blocks.rotary import Rotation, rotated, rotation
from fastgrpo.models.pipeline_model import PipelineModel
from fastgrpo.models.text_lengths import refuse_longer
from fastgrpo.models.weights import read_config
from fastgrpo.types import Conditions, Time


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
    modules = (block.attn, fused_swiglu_feed_forward, block.ff, block.ff_context)
    return double_stream(*modules, x_BLC, context_BMC, image_BE, text_BE, turns, None, attention)


def single_block(block: Any, x_BNC: Tensor, modulation_BE: Tensor, turns: Rotation, attention: Attention) -> Tensor:
    """All tokens after a block that has the same weights for text and image."""
    shift, scale, gate = parts(modulation_BE, 3)
    attn = block.attn
    widths = (*[attn.inner_dim] * 3, *[attn.mlp_hidden_dim] * 2)
    *qkv, hidden_gate, hidden = attn.to_qkv_mlp_proj(modulated(normed(x_BNC), shift, scale)).split(widths, dim=2)
    q, k, v = heads(tuple(qkv), attn.heads, attn.norm_q, attn.norm_k)
    seen_BNC = attention(rotated(q, turns), rotated(k, turns), v).flatten(2)
    return clipped(x_BNC + gate * attn.to_out(torch.cat([seen_BNC, swiglu(hidden_gate, hidden)], dim=2)))


class Flux2Network(BlockNetwork):
    blocks = (double_block, single_block)

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        # (text tokens, rows, columns) -> rotation
        self._rotations: dict[tuple[int, int, int], Rotation] = {}

    def modulate(self, transformer: Any, t: Time, pooled_BC: Tensor) -> Iterator[Tensor]:
        """Of the image tokens of all double blocks, of their text tokens, of all single blocks, then of the output."""
        # times are rounded to the type of the weights before they are scaled, as diffusers does when it samples
        embedding_BC = F.silu(transformer.time_guidance_embed(1000 * times(t, pooled_BC), None))
        yield transformer.double_stream_modulation_img.linear(embedding_BC)
        yield transformer.double_stream_modulation_txt.linear(embedding_BC)
        yield transformer.single_stream_modulation.linear(embedding_BC)
        yield transformer.norm_out.linear(embedding_BC)

    def forward(
        self, transformer: Any, x_BCHW: Tensor, embeds_BMC: Tensor, lengths_B: Tensor, *modulations_BE: Tensor
    ) -> Tensor:
        x_BLC = transformer.x_embedder(patched(x_BCHW.to(embeds_BMC.dtype), 1))
        context_BMC = transformer.context_embedder(embeds_BMC)
        num_image, (height, width) = x_BLC.shape[1], x_BCHW.shape[-2:]
        turns = self._turns(transformer, context_BMC.shape[1], height, width, x_BCHW.device)
        image_BE, text_BE, single_BE, output_BE = modulations_BE
        for block in transformer.transformer_blocks:
            x_BLC, context_BMC = self.run(double_block, block, x_BLC, context_BMC, image_BE, text_BE, turns)
        x_BNC = torch.cat([x_BLC, context_BMC], dim=1)
        for block in transformer.single_transformer_blocks:
            x_BNC = self.run(single_block, block, x_BNC, single_BE, turns)
        scale, shift = parts(output_BE, 2)
        v_BLC = transformer.proj_out(modulated(normed(x_BNC[:, :num_image]), shift, scale))
        return unpatched(v_BLC, height, width, 1)

    def _turns(self, transformer: Any, num_text: int, rows: int, columns: int, device: torch.device) -> Rotation:
        key = (num_text, rows, columns)
        if key not in self._rotations:
            # of time, row, column and number in the text
            places_N4 = torch.zeros(rows * columns + num_text, 4, device=device)
            places_N4[: rows * columns, 1] = torch.arange(rows, device=device).repeat_interleave(columns)
            places_N4[: rows * columns, 2] = torch.arange(columns, device=device).repeat(rows)
            places_N4[rows * columns :, 3] = torch.arange(num_text, device=device)
            self._rotations[key] = rotation(*transformer.pos_embed(places_N4))
        return self._rotations[key]


class Flux2Klein(PipelineModel):
    """``FlowModel`` over a Flux2KleinPipeline that draws from text alone."""

    pipeline_class = Flux2KleinPipeline
    transformer_class = Flux2Transformer2DModel
    autoencoder_class = AutoencoderKLFlux2
    has_small_decoders = False
    network_class = Flux2Network
    comfyui_knows = True
    text_encoders = ("text_encoder",)

    def check(self, transformer: Mapping[str, Any]) -> None:
        if transformer.get("guidance_embeds", True):
            raise ValueError(
                "this transformer takes guidance as an input, which FLUX.2 klein's do not; give the weights of a "
                "klein, as black-forest-labs/FLUX.2-klein-base-4B"
            )
        if self.guidance_scale != 1 and self._is_distilled:
            raise ValueError(
                f"model.guidance_scale is {self.guidance_scale}, but this model was distilled to sample without "
                "guidance; use model.guidance_scale=1, or model=flux2_klein"
            )

    @property
    def _is_distilled(self) -> bool:
        # the sizes are those of the model that was not
        index = {} if self._files is None else read_config(self._files.directory / "model_index.json")
        return bool(index.get("is_distilled", False))

    def _make_pipeline(self, dtype: torch.dtype, decode_dtype: torch.dtype) -> Any:
        if self._random is not None:
            return super()._make_pipeline(dtype, decode_dtype)
        # what latents are normalized by stays as exact as it is stored: the autoencoder's buffers, not its weights
        pipeline = super()._make_pipeline(dtype, torch.promote_types(decode_dtype, torch.float32))
        for weight in pipeline.vae.parameters():
            weight.data = weight.data.to(decode_dtype)
        return pipeline

    @classmethod
    def tokens_of(cls, transformer: Mapping[str, Any]) -> tuple[int, int | None]:
        # positions are turned into angles as they come
        return 1, None

    def text_widths(self, transformer: Mapping[str, Any]) -> tuple[int, int]:
        return transformer["joint_attention_dim"], 0

    @classmethod
    def pixels_of_latent(cls, vae: Mapping[str, Any]) -> int:
        return 2 * super().pixels_of_latent(vae)

    def num_channels(self, vae: Mapping[str, Any]) -> int:
        return 4 * super().num_channels(vae)

    def unscaled(self, x_BCHW: Tensor) -> Tensor:
        vae = self.pipeline.vae
        statistics = (vae.bn.running_mean, vae.bn.running_var)
        mean_C11, variance_C11 = (part_C.to(x_BCHW.dtype)[:, None, None] for part_C in statistics)
        # channels are [C, 2, 2] of the autoencoder's pixels
        return F.pixel_shuffle(x_BCHW * (variance_C11 + vae.config.batch_norm_eps).sqrt() + mean_C11, 2)

    def check_text(self, text: str) -> None:
        tokenizer = self.pipeline.tokenizer
        messages = [{"role": "user", "content": text}]
        asked = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        refuse_longer(text, len(tokenizer(asked)["input_ids"]), self.max_sequence_length, self.longest_text)

    def run_encoders(self, text: str) -> Conditions:
        self.check_text(text)
        embeds_BMC, _ = self.pipeline.encode_prompt([text], max_sequence_length=self.max_sequence_length)
        return Conditions(embeds_BMC, embeds_BMC.new_empty(1, 0))
