"""Qwen-Image, over diffusers' QwenImageTransformer2DModel.  arXiv:2508.02324.

Double-stream blocks as FLUX has them, modulated by the time alone.  A text is as long as Qwen2.5-VL reads it, without
its chat template's system prompt.  Queries and keys are rotated by row and column, which count from the middle of the
image; text tokens follow on its diagonal.  Guidance keeps the length that each token of the conditional branch has:

    w = u + g (c - u)           v = w |c| / |w|           c, u: branches with and without text, g: guidance_scale

Letters: B samples, C H W latent channels, height and width, L image tokens, M text tokens, E width of a modulation.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
from torch import Tensor
from torch.nn import functional as F

from fastgrpo.models.attention import Attention
from fastgrpo.models.blocks.double_stream import double_stream
from fastgrpo.models.blocks.feed_forward import gelu_feed_forward
from fastgrpo.models.blocks.modulation import modulated, normed, parts
from fastgrpo.models.blocks.network import BlockNetwork, times
from fastgrpo.models.blocks.patches import patched, unpatched
from fastgrpo.models.blocks.rotary import Rotation, complex_rotation
from fastgrpo.models.one_frame import OneFrame
from fastgrpo.models.pipeline_model import PipelineModel
from fastgrpo.models.text_lengths import refuse_longer
from fastgrpo.on_device import on_device
from fastgrpo.types import Conditions, Time
from fastgrpo_kernels import GuidedVelocity

_PATCH = 2
# rows of its tables of angles
_POSITIONS = 4096
# what makes other models of the class: editing, and images of several layers
_OTHERS = ("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope", "guidance_embeds")


def double_block(
    block: Any,
    x_BLC: Tensor,
    context_BMC: Tensor,
    image_BE: Tensor,
    text_BE: Tensor,
    turns: Rotation,
    lengths_B: Tensor,
    attention: Attention,
) -> tuple[Tensor, Tensor]:
    """Image and text tokens after a block; ``lengths_B`` counts both."""
    modules = (block.attn, gelu_feed_forward, block.img_mlp, block.txt_mlp)
    return double_stream(*modules, x_BLC, context_BMC, image_BE, text_BE, turns, lengths_B, attention)


class QwenImageNetwork(BlockNetwork):
    blocks = (double_block,)

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        # (text tokens, rows, columns) -> rotation
        self._rotations: dict[tuple[int, int, int], Rotation] = {}

    def modulate(self, transformer: Any, t: Time, pooled_BC: Tensor) -> Iterator[Tensor]:
        """Of each block's image and text tokens, then of the output."""
        embedding_BC = F.silu(transformer.time_text_embed(times(t, pooled_BC), pooled_BC))
        for block in transformer.transformer_blocks:
            yield block.img_mod[1](embedding_BC)
            yield block.txt_mod[1](embedding_BC)
        yield transformer.norm_out.linear(embedding_BC)

    def forward(
        self, transformer: Any, x_BCHW: Tensor, embeds_BMC: Tensor, lengths_B: Tensor, *modulations_BE: Tensor
    ) -> Tensor:
        x_BLC = transformer.img_in(patched(x_BCHW.to(embeds_BMC.dtype)))
        context_BMC = transformer.txt_in(transformer.txt_norm(embeds_BMC))
        num_image, (height, width) = x_BLC.shape[1], x_BCHW.shape[-2:]
        turns = self._turns(transformer, context_BMC.shape[1], height // _PATCH, width // _PATCH, x_BCHW.device)
        modulations, lengths_B = iter(modulations_BE), num_image + lengths_B
        for block in transformer.transformer_blocks:
            inputs = (x_BLC, context_BMC, next(modulations), next(modulations), turns, lengths_B)
            x_BLC, context_BMC = self.run(double_block, block, *inputs)
        scale, shift = parts(next(modulations), 2)
        return unpatched(transformer.proj_out(modulated(normed(x_BLC), shift, scale)), height, width)

    def _turns(self, transformer: Any, num_text: int, rows: int, columns: int, device: torch.device) -> Rotation:
        key = (num_text, rows, columns)
        if key not in self._rotations:
            turns = transformer.pos_embed([(1, rows, columns)], max_txt_seq_len=num_text, device=torch.device("cpu"))
            self._rotations[key] = complex_rotation(on_device(torch.cat(turns), device))
        return self._rotations[key]


class QwenImage(PipelineModel):
    """``FlowModel`` over a QwenImagePipeline; latents are [B, 16, H, W], without the dimension of frames."""

    pipeline_class = QwenImagePipeline
    transformer_class = QwenImageTransformer2DModel
    autoencoder_class = AutoencoderKLQwenImage
    has_small_decoders = False
    network_class = QwenImageNetwork
    comfyui_knows = True
    text_encoders = ("text_encoder",)
    has_lengths = True
    longest_text = 1024
    guidance_is_linear = False

    def velocity_and_reference(
        self, x_BCHW: Tensor, t: Time, conditions: Conditions, unconditional: Tensor | None = None
    ) -> tuple[Tensor | GuidedVelocity, Tensor | GuidedVelocity]:
        if self.has_two_branches and unconditional is None:
            # a batch of its own, as in a rollout, which has no branch of it to hand on: in another it rounds otherwise
            with torch.no_grad():
                unconditional = self._run(self.adaptation.transformer, t, *self._without_text(x_BCHW, conditions))
        return super().velocity_and_reference(x_BCHW, t, conditions, unconditional)

    def guided(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        exact = torch.promote_types(conditional.dtype, torch.float32)
        conditional_BLC, unconditional_BLC = (patched(v_BCHW.to(exact)) for v_BCHW in (conditional, unconditional))
        v_BLC = unconditional_BLC + self.guidance_scale * (conditional_BLC - unconditional_BLC)
        v_BLC = v_BLC * (conditional_BLC.norm(dim=2, keepdim=True) / v_BLC.norm(dim=2, keepdim=True))
        return unpatched(v_BLC, *conditional.shape[-2:])

    def check(self, transformer: Mapping[str, Any]) -> None:
        if unknown := [name for name in _OTHERS if transformer.get(name)]:
            raise ValueError(
                f"this transformer has {unknown[0]}, which text-to-image models have not; give the weights of one, as "
                "Qwen/Qwen-Image"
            )

    @classmethod
    def tokens_of(cls, transformer: Mapping[str, Any]) -> tuple[int, int | None]:
        # positions of the text begin behind half of the image
        return _PATCH, 2 * (_POSITIONS - cls.longest_text)

    def text_widths(self, transformer: Mapping[str, Any]) -> tuple[int, int]:
        return transformer["joint_attention_dim"], 0

    def check_text(self, text: str) -> None:
        pipeline = self.pipeline
        prompt = pipeline.prompt_template_encode.format(text)
        num_tokens = len(pipeline.tokenizer(prompt).input_ids) - pipeline.prompt_template_encode_start_idx
        refuse_longer(text, num_tokens, self.max_sequence_length, self.longest_text)

    def call_arguments(self) -> dict[str, Any]:
        guidance: dict[str, Any] = {"true_cfg_scale": self.guidance_scale}
        if self.has_two_branches:
            guidance["negative_prompt"] = ""
        return guidance | {"max_sequence_length": self.max_sequence_length}

    def run_encoders(self, text: str) -> Conditions:
        self.check_text(text)
        embeds_BLC, _ = self.pipeline.encode_prompt([text], max_sequence_length=self.max_sequence_length)
        return Conditions(embeds_BLC, embeds_BLC.new_zeros(1, 0))

    @classmethod
    def pixels_of_latent(cls, vae: Mapping[str, Any]) -> int:
        return 2 ** len(vae.get("temperal_downsample", (False, True, True)))

    def num_channels(self, vae: Mapping[str, Any]) -> int:
        return int(vae.get("z_dim", 16))

    @cached_property
    def decoder(self) -> OneFrame:
        return OneFrame(self.pipeline.vae)

    @staticmethod
    def decoded(vae: Any, z_BCHW: Tensor) -> Tensor:
        # the first frame of a video has none before it, so there is nothing to keep in vae.decode's cache
        images: Tensor = vae.decoder(vae.post_quant_conv(z_BCHW[:, :, None]))[:, :, 0]
        return images
