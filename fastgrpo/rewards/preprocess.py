"""Images as a reward model's own processor makes them, on the device they are on: no PIL, no copy to the CPU.

Bytes, antialiased bicubic resize of the short side, center crop, normalization, cast: one pass of
``fastgrpo_kernels.preprocess_images``, which equals Pillow to the byte.  Letters: B images, C H W.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgrpo_kernels import preprocess_images

_BICUBIC = 3


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """Images in [0, 1] to a vision tower's input [B, 3, crop_height, crop_width]."""

    short_side: int
    crop_height: int
    crop_width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any], origin: str) -> "Preprocess":
        """The steps of a ``preprocessor_config.json``; ValueError for one that does something else."""
        size, crop = config.get("size"), config.get("crop_size")
        short_side = size.get("shortest_edge") if isinstance(size, dict) else size
        crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
        if (
            not isinstance(short_side, int)
            or not isinstance(crop, dict)
            or config.get("resample", _BICUBIC) != _BICUBIC
        ):
            raise ValueError(
                f"{origin} asks for size {size}, crop {crop}, resample {config.get('resample')}; a CLIP directory has "
                "size.shortest_edge, crop_size.height and width, and resample 3 (bicubic)"
            )
        if max(crop["height"], crop["width"]) > short_side:
            raise ValueError(f"{origin} crops {crop} out of a short side of {short_side}; make the crop fit")
        return cls(
            short_side=short_side,
            crop_height=crop["height"],
            crop_width=crop["width"],
            mean=tuple(config["image_mean"]),
            std=tuple(config["image_std"]),
        )

    def __call__(self, images_BCHW: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return preprocess_images(
            images_BCHW,
            resize=self.short_side,
            crop=(self.crop_height, self.crop_width),
            mean=self.mean,
            std=self.std,
            low=0.0,
            dtype=dtype,
        )
