"""Images as a reward model's own processor makes them, on the device they are on: no PIL, no copy to the CPU.

Bytes, antialiased bicubic resize of the short side, center crop, normalization, cast: one pass of
``fastgrpo_kernels.preprocess_images``, which equals Pillow to the byte.  Letters: B images, C H W.
"""

import json
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgrpo_kernels import preprocess_images

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_BICUBIC = 3
_STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """Images in [0, 1] to a vision tower's input [B, 3, crop_height, crop_width].

    Of d pixels too many, d // 2 are cut before the crop if ``crop_offset`` is "floor", as transformers does it, and
    round(d / 2) if it is "nearest", as torchvision does it.
    """

    short_side: int
    crop_height: int
    crop_width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_offset: Literal["floor", "nearest"] = "floor"

    @classmethod
    def from_file(cls, path: Path) -> "Preprocess":
        """Of a ``preprocessor_config.json``; ValueError for one that cannot be read or does something else."""
        try:
            return cls.from_config(json.loads(path.read_text(encoding="utf-8")), str(path))
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); download it again") from error

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
            or not all(config.get(step, True) for step in _STEPS)
        ):
            raise ValueError(
                f"{origin} asks for size {size}, crop {crop}, resample {config.get('resample')}, or leaves a step out; "
                "a CLIP directory has size.shortest_edge, crop_size.height and width, resample 3 (bicubic), all steps"
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
        # one row more on the far side of the kernel's crop moves its center by one
        down, right = self._shift(*images_BCHW.shape[-2:])
        pixels_BCHW = preprocess_images(
            images_BCHW,
            resize=self.short_side,
            crop=(self.crop_height + down, self.crop_width + right),
            mean=self.mean,
            std=self.std,
            low=0.0,
            dtype=dtype,
        )
        return pixels_BCHW[..., down:, right:].contiguous()

    def _shift(self, height: int, width: int) -> tuple[int, int]:
        """How many rows and columns later than at floor(d / 2) the crop starts: 0 or 1."""
        if self.crop_offset == "floor":
            return 0, 0
        resized = [int(self.short_side * side / min(height, width)) for side in (height, width)]
        crops = (self.crop_height, self.crop_width)
        down, right = (round(spare / 2) - spare // 2 for spare in map(operator.sub, resized, crops))
        return down, right


@dataclass(frozen=True, kw_only=True)
class PadToSquare:
    """Images in [0, 1] to [B, 3, size, size]: the long side is resized to ``size``, black is put around the short one.

    As HPSv2 does it: it resizes floats, so that neither pass rounds to bytes or clamps.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images_BCHW: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        # its images are read from files of bytes
        bytes_BCHW = images_BCHW.float().mul(255).round_().clamp_(0, 255).div_(255)
        height, width = images_BCHW.shape[-2:]
        scale = self.size / max(height, width)
        resized = (round(height * scale), round(width * scale))
        pixels_BCHW = preprocess_images(
            bytes_BCHW, resize=resized, mean=self.mean, std=self.std, low=0.0, match="torch", dtype=dtype
        )
        (above, below), (left, right) = ((spare // 2, spare - spare // 2) for spare in (self.size - n for n in resized))
        if resized == (self.size, self.size):
            return pixels_BCHW
        channels = zip(pixels_BCHW.split(1, dim=1), self.mean, self.std, strict=True)
        # black is 0 before it is normalized
        padded = [F.pad(one_B1HW, (left, right, above, below), value=-m / s) for one_B1HW, m, s in channels]
        return torch.cat(padded, dim=1)
