"""Qwen-Image and Qwen-Image 2.1 in miniature, and how diffusers computes what we do: the other path of the tests."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImage21Pipeline, QwenImagePipeline
from torch import Tensor

from fastgrpo.models.lora import LoRA
from fastgrpo.models.pipeline_model import PipelineModel
from fastgrpo.models.qwen_image import QwenImage
from fastgrpo.models.qwen_image_21 import QwenImage21
from fastgrpo.models.random_weights import random_module
from fastgrpo.models.text_processor import TextProcessor
from fastgrpo.types import Conditions
from tests import tiny_qwen_image, tiny_qwen_image_21
from tests.tiny_qwen_image import LONG, SHORT, TEXT_WIDTH

# of 8 and of 75 tokens: they are filled up to 64 and to 128
TEXTS = [SHORT, LONG]
GUIDANCE = 4.0
SIZE = 64
NUM_STEPS = 4


@dataclass(frozen=True)
class Family:
    """``latent`` is of an image of 64x64 pixels.

    load: a directory -> diffusers' pipeline.  images: (pipeline, texts, start, guidance_scale) -> [B, 3, H, W].
    diffusers_velocity: (transformer, x, t, conditions) -> v.
    """

    name: str
    model: type[PipelineModel]
    latent: tuple[int, int, int]
    make_pipeline: Callable[[Path], Path]
    make_transformer: Callable[..., Any]
    load: Callable[[Path], Any]
    images: Callable[[Any, list[str], Tensor, float], Tensor]
    diffusers_velocity: Callable[[Any, Tensor, float | Tensor, Conditions], Tensor]

    def make_model(self, weights: Path, **settings: Any) -> Any:
        defaults: dict[str, Any] = {
            "weights": str(weights),
            "adaptation": LoRA(rank=2, alpha=4.0),
            "resolution": SIZE,
            "guidance_scale": GUIDANCE,
            "max_sequence_length": 128,
        }
        return self.model(**defaults | settings)

    def make_start(self, num_samples: int = 2) -> Tensor:
        return torch.randn(num_samples, *self.latent, generator=torch.Generator().manual_seed(3))

    def make_random_transformer(self, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
        return random_module(partial(self.make_transformer, **settings), device="cpu", dtype=dtype, seed=0)

    def make_inputs(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Conditions]:
        """Two samples that are not square, of 7 and 3 tokens; what fills up the second is no zeros."""
        generator = torch.Generator().manual_seed(1)
        channels, side, _ = self.latent
        shapes = (2, channels, side + 2, side), (2, 7, TEXT_WIDTH)
        x_BCHW, embeds_BLC = (torch.randn(shape, generator=generator) for shape in shapes)
        lengths_B = torch.tensor([7, 3], dtype=torch.int32)
        return x_BCHW, Conditions(embeds_BLC.to(dtype), torch.zeros(2, 0, dtype=dtype), (0, 1), lengths_B=lengths_B)


def _images(pipeline: Any, texts: list[str], packed: Tensor, sides: Sequence[int], guidance_scale: float) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    guidance: dict[str, Any] = {"true_cfg_scale": guidance_scale}
    if guidance_scale != 1:
        guidance["negative_prompt"] = [""] * len(texts)
    height, width = (side * pipeline.vae_scale_factor for side in sides)
    size = {"num_inference_steps": NUM_STEPS, "height": height, "width": width, "output_type": "pt"}
    images: Tensor = pipeline(texts, latents=packed, **guidance, **size).images
    return images


def _images_1(pipeline: Any, texts: list[str], start: Tensor, guidance_scale: float) -> Tensor:
    packed = QwenImagePipeline._pack_latents(start, *start.shape)
    return _images(pipeline, texts, packed, start.shape[2:], guidance_scale)


def _velocity_1(transformer: Any, x_BCHW: Tensor, t: float | Tensor, conditions: Conditions) -> Tensor:
    height, width = x_BCHW.shape[-2:]
    x = QwenImagePipeline._pack_latents(x_BCHW.to(transformer.dtype), *x_BCHW.shape)
    v = transformer(
        hidden_states=x,
        encoder_hidden_states=conditions.embeds_BLC,
        encoder_hidden_states_mask=torch.arange(conditions.embeds_BLC.shape[1]) < conditions.lengths_B[:, None],
        timestep=t if isinstance(t, Tensor) else torch.full((len(x),), t),
        img_shapes=[[(1, height // 2, width // 2)]] * len(x),
        return_dict=False,
    )[0]
    return QwenImagePipeline._unpack_latents(v, 8 * height, 8 * width, 8)[:, :, 0]


def batch_images_21(pipeline: Any, texts: list[str], start: Tensor, guidance_scale: float) -> Tensor:
    """Of one batch, in which diffusers puts all images behind the longest text; laid over white."""
    rgba = _images(pipeline, texts, start.flatten(2).transpose(1, 2), start.shape[2:], guidance_scale)
    assert rgba.shape[1] == 4
    return rgba[:, :3] * rgba[:, 3:] + (1 - rgba[:, 3:])


def _images_21(pipeline: Any, texts: list[str], start: Tensor, guidance_scale: float) -> Tensor:
    """Of one prompt after the other."""
    rows = zip(texts, start.split(1), strict=True)
    return torch.cat([batch_images_21(pipeline, [text], x, guidance_scale) for text, x in rows])


def _velocity_21(transformer: Any, x_BCHW: Tensor, t: float | Tensor, conditions: Conditions) -> Tensor:
    """One sample after the other, without what fills its text up."""
    height, width = x_BCHW.shape[-2:]
    found = []
    for row, length in enumerate(conditions.lengths_B.tolist()):
        is_image = [False] * length + [True] * (height * width // 4)
        v = transformer(
            hidden_states=x_BCHW[row : row + 1].to(transformer.dtype).flatten(2).transpose(1, 2),
            encoder_hidden_states=conditions.embeds_BLC[row : row + 1, :length],
            timestep=t[row : row + 1] if isinstance(t, Tensor) else torch.full((1,), t),
            img_shapes=[[(1, height, width)]],
            img_mask=torch.tensor([is_image]),
            return_dict=False,
        )[0]
        found.append(v[:, -height * width :].transpose(1, 2).unflatten(2, (height, width)))
    return torch.cat(found)


def _load_21(weights: Path) -> QwenImage21Pipeline:
    # as published it has videos too, for which it needs torchvision
    return QwenImage21Pipeline.from_pretrained(weights, processor=TextProcessor.of(weights / "processor"))


QWEN_IMAGE = Family(
    name="qwen_image",
    model=QwenImage,
    latent=(16, 8, 8),
    make_pipeline=tiny_qwen_image.make_pipeline,
    make_transformer=tiny_qwen_image.make_transformer,
    load=QwenImagePipeline.from_pretrained,
    images=_images_1,
    diffusers_velocity=_velocity_1,
)
QWEN_IMAGE_21 = Family(
    name="qwen_image_21",
    model=QwenImage21,
    latent=(8, 4, 4),
    make_pipeline=tiny_qwen_image_21.make_pipeline,
    make_transformer=tiny_qwen_image_21.make_transformer,
    load=_load_21,
    images=_images_21,
    diffusers_velocity=_velocity_21,
)
FAMILIES = (QWEN_IMAGE, QWEN_IMAGE_21)
