"""Qwen-Image 2.1, over diffusers' QwenImage21Transformer2DModel.  https://github.com/QwenLM/Qwen-Image-2.1

One sequence of image and text tokens with the same weights for both, in blocks without shifts or biases:

    x <- x + tanh(g1) attention(norm(x) * (1 + b1))         g, b: of the time t for image tokens, of t = 0 for the text
    x <- x + tanh(g2) swiglu(norm(x) * (1 + b2))

Text tokens see the text before them alone, image tokens see all: what a text becomes depends on neither image nor time.
Queries and keys are rotated by three positions: those of a text token count from 0, those of the image are the length
of its text, its row and its column from the middle.  diffusers takes the length of the longest text of a batch; ours is
each sample's own, so that a sample does not depend on its batch: what diffusers computes of one prompt.
Letters: B samples, L image tokens, M text tokens, N = L + M, C width of a token, E width of a modulation, H heads, D
width of a head.
"""

from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage21, QwenImage21Pipeline, QwenImage21Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen3VLProcessor

from fastgrpo.models.attention import Attention
from fastgrpo.models.blocks.feed_forward import gelu_projected, swiglu
from fastgrpo.models.blocks.heads import self_heads
from fastgrpo.models.blocks.modulation import normed, parts
from fastgrpo.models.blocks.network import BlockNetwork, clipped, times
from fastgrpo.models.blocks.patches import patched, unpatched
from fastgrpo.models.blocks.rotary import Rotation, complex_rotation, rotated
from fastgrpo.models.low_rank import projected
from fastgrpo.models.pipeline_model import PipelineModel
from fastgrpo.models.text_lengths import refuse_longer
from fastgrpo.models.text_processor import TextProcessor
from fastgrpo.on_device import on_device
from fastgrpo.types import Conditions, Time

# positions before and behind the middle of the image that its tables of angles have
_MOST_BEFORE_MIDDLE = 1024


def causal_block(
    block: Any,
    x_BNC: Tensor,
    num_image: int,
    image_BE: Tensor,
    text_BE: Tensor,
    turns: Rotation,
    lengths_B: Tensor,
    attention: Attention,
) -> Tensor:
    """All tokens after a block, the image's first; ``lengths_B`` counts both."""
    is_text_N1 = torch.arange(x_BNC.shape[1], device=x_BNC.device)[:, None] >= num_image
    scale, gate, *rest = (
        torch.where(is_text_N1, text, image) for image, text in zip(parts(image_BE, 4), parts(text_BE, 4), strict=True)
    )
    q, k, v = self_heads(block.attn, normed(x_BNC) * (1 + scale))
    seen_BNHD = _block_causal(rotated(q, turns), rotated(k, turns), v, num_image, lengths_B, attention)
    x_BNC = x_BNC + gate.tanh() * block.attn.to_out[0](seen_BNHD.flatten(2))
    scale, gate = rest
    hidden = projected(_gate_and_value(block), normed(x_BNC) * (1 + scale))
    return clipped(x_BNC + gate.tanh() * block.img_mlp.out(swiglu(*hidden)))


def _block_causal(
    q_BNHD: Tensor, k_BNHD: Tensor, v_BNHD: Tensor, num_image: int, lengths_B: Tensor, attention: Attention
) -> Tensor:
    """Image tokens see all, text tokens those of the text up to themselves: what fills a text up is behind it."""
    q_BHMD, k_BHMD, v_BHMD = (part[:, num_image:].transpose(1, 2) for part in (q_BNHD, k_BNHD, v_BNHD))
    of_text_BMHD = F.scaled_dot_product_attention(q_BHMD, k_BHMD, v_BHMD, is_causal=True).transpose(1, 2)
    # backends want as many queries as keys; what the few text tokens see there is dropped
    of_image_BLHD = attention(q_BNHD, k_BNHD, v_BNHD, lengths_B)[:, :num_image]
    return torch.cat([of_image_BLHD, of_text_BMHD], dim=1)


def _text_tokens(text: Any, embeds_BMC: Tensor) -> Tensor:
    exact_BMC = embeds_BMC.to(torch.promote_types(embeds_BMC.dtype, torch.float32))
    # stored less one
    scale_C = 1 + text.text_norm.weight.to(exact_BMC.dtype)
    normed_BMC = F.rms_norm(exact_BMC, exact_BMC.shape[-1:], scale_C, text.text_norm.eps)
    tokens: Tensor = text.out_layer(gelu_projected(text.in_layer, normed_BMC.to(embeds_BMC.dtype)))
    return tokens


def _gate_and_value(block: Any) -> tuple[nn.Module, nn.Module]:
    """The layers of a feed-forward that read one input."""
    return block.img_mlp.gate_layer, block.img_mlp.proj


class QwenImage21Network(BlockNetwork):
    blocks = (causal_block,)

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        # (text tokens, rows, columns) -> complex turns by the length of the text, of image tokens, of text tokens
        self._turns: dict[tuple[int, int, int], tuple[Tensor, Tensor, Tensor]] = {}

    def stacks(self, transformer: Any) -> Iterator[Sequence[nn.Module]]:
        yield from super().stacks(transformer)
        yield from map(_gate_and_value, transformer.transformer_blocks)

    def modulate(self, transformer: Any, t: Time, pooled_BC: Tensor) -> Iterator[Tensor]:
        """Of image and of text tokens, the same in each block, then of the output."""
        embedding_BC = transformer.time_text_embed(times(t, pooled_BC), pooled_BC)
        yield transformer.modulation(embedding_BC)
        of_text = 0.0 if transformer.config.causal_condition else t
        yield transformer.modulation(transformer.time_text_embed(times(of_text, pooled_BC), pooled_BC))
        yield transformer.norm_out.linear(F.silu(embedding_BC))

    def forward(
        self, transformer: Any, x_BCHW: Tensor, embeds_BMC: Tensor, lengths_B: Tensor, *modulations_BE: Tensor
    ) -> Tensor:
        x_BLC = transformer.img_in(patched(x_BCHW.to(embeds_BMC.dtype), 1))
        x_BNC = torch.cat([x_BLC, _text_tokens(transformer.txt_in, embeds_BMC)], dim=1)
        num_image, (height, width) = x_BLC.shape[1], x_BCHW.shape[-2:]
        turns = self._rotation(transformer, embeds_BMC.shape[1], height, width, lengths_B)
        image_BE, text_BE, scale_BC = modulations_BE
        lengths_B = num_image + lengths_B
        for block in transformer.transformer_blocks:
            x_BNC = self.run(causal_block, block, x_BNC, num_image, image_BE, text_BE, turns, lengths_B)
        return unpatched(transformer.proj_out(normed(x_BNC[:, :num_image]) * (1 + scale_BC[:, None])), height, width, 1)

    def _rotation(self, transformer: Any, num_text: int, rows: int, columns: int, lengths_B: Tensor) -> Rotation:
        key = (num_text, rows, columns)
        if key not in self._turns:
            # tables on the CPU of turns by 0 to 8191 and by -1024 to -1, which are at their end
            first, *others = transformer.pos_embed.freqs
            down, across = (torch.arange(-(n - n // 2), n // 2) for n in (rows, columns))
            places = down.repeat_interleave(columns), across.repeat(rows)
            image_LE = torch.cat([table[place] for table, place in zip(others, places, strict=True)], dim=1)
            text_ME = torch.cat([table[:num_text] for table in (first, *others)], dim=1)
            by_length, of_image, of_text = (
                on_device(turns, lengths_B.device) for turns in (first[: num_text + 1], image_LE, text_ME)
            )
            self._turns[key] = by_length, of_image, of_text
        by_length, image_LE, text_ME = self._turns[key]
        frame_BLE = by_length[lengths_B.long()][:, None].expand(-1, len(image_LE), -1)
        image_BLE = torch.cat([frame_BLE, image_LE.expand(len(lengths_B), -1, -1)], dim=2)
        return complex_rotation(torch.cat([image_BLE, text_ME.expand(len(lengths_B), -1, -1)], dim=1))


class _NoProcessor:
    """Of a pipeline that reads no text: what it is asked for as it is made."""

    tokenizer = SimpleNamespace(encode=lambda text: [0])

    def apply_chat_template(self, messages: Any, **settings: Any) -> list[list[int]]:
        return [[]]


class QwenImage21(PipelineModel):
    """``FlowModel`` over a QwenImage21Pipeline; its images of four channels are laid over white."""

    pipeline_class = QwenImage21Pipeline
    transformer_class = QwenImage21Transformer2DModel
    autoencoder_class = AutoencoderKLQwenImage21
    has_small_decoders = False
    network_class = QwenImage21Network
    text_encoders = ("text_encoder",)
    has_lengths = True
    longest_text = 1024

    @classmethod
    def tokens_of(cls, transformer: Mapping[str, Any]) -> tuple[int, int | None]:
        # a token is one latent pixel, and their number in a row is even, as the pipeline rounds it
        return 2, _MOST_BEFORE_MIDDLE

    def text_widths(self, transformer: Mapping[str, Any]) -> tuple[int, int]:
        return transformer["context_in_dim"], 0

    def _load(self, dtype: torch.dtype, decode_dtype: torch.dtype, without: tuple[str, ...]) -> Any:
        assert self._files is not None
        processor = TextProcessor.of(self._files.directory / "processor")
        pipeline = self._files.load(dtype, decode_dtype, without, processor=processor)
        # what it is when it is loaded from where it is saved
        pipeline.register_to_config(processor=("transformers", Qwen3VLProcessor.__name__))
        return pipeline

    def pipeline_of(self, **modules: Any) -> Any:
        return super().pipeline_of(processor=_NoProcessor(), **modules)

    def check_text(self, text: str) -> None:
        pipeline = self.pipeline
        # an empty text is a blank to it
        prompt = pipeline.prompt_template_t2i.format(text or " ")
        num_tokens = len(pipeline.processor.tokenizer(prompt).input_ids) - pipeline._drop_idx
        refuse_longer(text, num_tokens, self.max_sequence_length, self.longest_text)

    def call_arguments(self) -> dict[str, Any]:
        guidance: dict[str, Any] = {"true_cfg_scale": self.guidance_scale}
        if self.has_two_branches:
            guidance["negative_prompt"] = ""
        return guidance | {"max_sequence_length": self.max_sequence_length}

    def run_encoders(self, text: str) -> Conditions:
        self.check_text(text)
        embeds_BLC, _, _ = self.pipeline.encode_prompt([text])
        return Conditions(embeds_BLC, embeds_BLC.new_zeros(1, 0))

    @classmethod
    def pixels_of_latent(cls, vae: Mapping[str, Any]) -> int:
        return int(vae.get("scale_factor_spatial", 16))

    def num_channels(self, vae: Mapping[str, Any]) -> int:
        return int(vae.get("z_dim", 64))

    @staticmethod
    def decoded(vae: Any, z_BCHW: Tensor) -> Tensor:
        images_BCHW = vae.decoder(vae.post_quant_conv(z_BCHW[:, :, None]), first_chunk=True)[:, :, 0]
        if vae.config.out_channels == 3:
            return images_BCHW
        color_BCHW, alpha_B1HW = images_BCHW.float().clamp(-1, 1).split([3, 1], dim=1)
        alpha_B1HW = (alpha_B1HW + 1) / 2
        return color_BCHW * alpha_B1HW + (1 - alpha_B1HW)
