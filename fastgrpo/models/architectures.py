"""Sizes of published models, and pipelines of these sizes with random weights: what ``model.weights=random`` builds.

Text encoders are left out; conditions are random too, a function of the text (``random_weights``).
Letters: L text tokens, C width of an embedding.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKL,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor

from fastgrpo.models.random_weights import random_embedding, random_module

# of all these models' autoencoders
LATENT_CHANNELS = 16
# tokens of CLIP, before those of T5
_CLIP_TOKENS = 77
_POSITION_WIDTHS = 4


@dataclass(frozen=True, kw_only=True)
class Architecture(ABC):
    """Called with a device and types, it is a pipeline with random weights.

    text_width, pooled_width: of a token's and of a whole text's embedding.  decoder_channels: of the autoencoder, from
    pixels to latents; each but the first halves the image.  decoder_layers: of each of its levels.  seed: of weights
    and conditions.
    """

    # what latents are shifted by, then multiplied with, after encoding
    latent_shift: ClassVar[float]
    latent_scale: ClassVar[float]

    num_layers: int
    num_heads: int
    head_width: int
    pooled_width: int
    text_width: int = 4096
    decoder_channels: tuple[int, ...] = (128, 256, 512, 512)
    decoder_layers: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "decoder_channels", self._numbers("decoder_channels"))
        self._check_least(1, "num_layers", "num_heads", "head_width", "pooled_width", "text_width", "decoder_layers")
        self._check_least(0, "seed")
        if not self.decoder_channels or min(self.decoder_channels) < 1:
            raise ValueError(f"model.architecture.decoder_channels must be positive, got {self.decoder_channels}")

    def _numbers(self, key: str) -> tuple[int, ...]:
        value: Any = getattr(self, key)
        if isinstance(value, str | int | float) or not all(isinstance(number, int) for number in value):
            raise ValueError(f"model.architecture.{key} is a list of whole numbers, as in [8,16], got {value!r}")
        return tuple(value)

    def _check_least(self, least: int, *keys: str) -> None:
        for key in keys:
            if getattr(self, key) < least:
                raise ValueError(f"model.architecture.{key} must be at least {least}, got {getattr(self, key)}")

    @abstractmethod
    def __call__(self, *, device: torch.device, dtype: torch.dtype, decode_dtype: torch.dtype) -> Any: ...

    @property
    @abstractmethod
    def transformer_config(self) -> dict[str, Any]:
        """As a pipeline's directory has it in transformer/config.json."""

    @abstractmethod
    def make_transformer(self) -> Any:
        """The transformer, with diffusers' own start."""

    @abstractmethod
    def num_text_tokens(self, max_sequence_length: int) -> int: ...

    def condition(
        self, text: str, max_sequence_length: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Random embeddings [1, L, C] and pooled embeddings [1, C] of a text."""
        shapes = ((1, self.num_text_tokens(max_sequence_length), self.text_width), (1, self.pooled_width))
        embeds_BLC, pooled_BC = (
            random_embedding(text, *shape, seed=self.seed, dtype=dtype, device=device) for shape in shapes
        )
        return embeds_BLC, pooled_BC

    def make_autoencoder(self) -> AutoencoderKL:
        """The autoencoder, with diffusers' own start."""
        levels = len(self.decoder_channels)
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=self.decoder_channels,
            layers_per_block=self.decoder_layers,
            latent_channels=LATENT_CHANNELS,
            norm_num_groups=math.gcd(32, *self.decoder_channels),
            scaling_factor=self.latent_scale,
            shift_factor=self.latent_shift,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )

    def _parts(self, device: torch.device, dtype: torch.dtype, decode_dtype: torch.dtype) -> dict[str, Any]:
        """Transformer and autoencoder, without text encoders and scheduler."""
        absent = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
        return {
            "transformer": random_module(self.make_transformer, device=device, dtype=dtype, seed=self.seed),
            "vae": random_module(self.make_autoencoder, device=device, dtype=decode_dtype, seed=self.seed + 1),
            **dict.fromkeys(absent),
        }


@dataclass(frozen=True, kw_only=True)
class SD3Architecture(Architecture):
    """A StableDiffusion3Pipeline; by default SD3.5-medium's.  num_dual_layers: blocks with an image attention more."""

    latent_shift = 0.0609
    latent_scale = 1.5305

    num_layers: int = 24
    num_heads: int = 24
    head_width: int = 64
    pooled_width: int = 2048
    num_dual_layers: int = 13
    max_positions: int = 384

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_least(1, "max_positions")
        if not 0 <= self.num_dual_layers <= self.num_layers:
            raise ValueError(
                f"model.architecture.num_dual_layers must lie in 0 to num_layers={self.num_layers}, got "
                f"{self.num_dual_layers}"
            )
        if self.num_heads * self.head_width % _POSITION_WIDTHS:
            raise ValueError(
                f"model.architecture.num_heads * head_width must be a multiple of {_POSITION_WIDTHS}, the sines and "
                f"cosines of two coordinates, got {self.num_heads} * {self.head_width}"
            )

    def __call__(
        self, *, device: torch.device, dtype: torch.dtype, decode_dtype: torch.dtype
    ) -> StableDiffusion3Pipeline:
        return StableDiffusion3Pipeline(
            **self._parts(device, dtype, decode_dtype),
            text_encoder_3=None,
            tokenizer_3=None,
        )

    @property
    def transformer_config(self) -> dict[str, Any]:
        return {
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": LATENT_CHANNELS,
            "out_channels": LATENT_CHANNELS,
            "num_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "attention_head_dim": self.head_width,
            "caption_projection_dim": self.num_heads * self.head_width,
            "joint_attention_dim": self.text_width,
            "pooled_projection_dim": self.pooled_width,
            "pos_embed_max_size": self.max_positions,
            "dual_attention_layers": tuple(range(self.num_dual_layers)),
            "qk_norm": "rms_norm",
        }

    def make_transformer(self) -> SD3Transformer2DModel:
        return SD3Transformer2DModel(**self.transformer_config)

    def num_text_tokens(self, max_sequence_length: int) -> int:
        return _CLIP_TOKENS + max_sequence_length


@dataclass(frozen=True, kw_only=True)
class FluxArchitecture(Architecture):
    """A FluxPipeline; by default FLUX.1-dev's.  rotated_widths: channels of a head that each coordinate turns."""

    latent_shift = 0.1159
    latent_scale = 0.3611

    num_layers: int = 19
    num_heads: int = 24
    head_width: int = 128
    pooled_width: int = 768
    num_single_layers: int = 38
    rotated_widths: tuple[int, int, int] = (16, 56, 56)
    guidance_embeds: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "rotated_widths", self._numbers("rotated_widths"))
        self._check_least(0, "num_single_layers")
        if len(self.rotated_widths) != 3 or any(width < 2 or width % 2 for width in self.rotated_widths):
            raise ValueError(
                f"model.architecture.rotated_widths must be three even positive numbers, got {self.rotated_widths}"
            )
        if sum(self.rotated_widths) != self.head_width:
            raise ValueError(
                f"model.architecture.rotated_widths must add up to head_width: {self.rotated_widths}, {self.head_width}"
            )

    def __call__(self, *, device: torch.device, dtype: torch.dtype, decode_dtype: torch.dtype) -> FluxPipeline:
        return FluxPipeline(**self._parts(device, dtype, decode_dtype))

    @property
    def transformer_config(self) -> dict[str, Any]:
        return {
            "in_channels": 4 * LATENT_CHANNELS,
            "num_layers": self.num_layers,
            "num_single_layers": self.num_single_layers,
            "num_attention_heads": self.num_heads,
            "attention_head_dim": self.head_width,
            "joint_attention_dim": self.text_width,
            "pooled_projection_dim": self.pooled_width,
            "guidance_embeds": self.guidance_embeds,
            "axes_dims_rope": self.rotated_widths,
        }

    def make_transformer(self) -> FluxTransformer2DModel:
        return FluxTransformer2DModel(**self.transformer_config)

    def num_text_tokens(self, max_sequence_length: int) -> int:
        return max_sequence_length
