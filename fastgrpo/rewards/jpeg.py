"""The size of an image as a JPEG file, in kilobytes (1000 bytes), from DDPO, arXiv:2305.13301, section 5.

    compressibility = -kB        incompressibility = kB

Flow-GRPO divides compressibility by 500: a weight of 0.002 is the same.  Letters: B images.
"""

from dataclasses import dataclass
from io import BytesIO
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastgrpo.rewards.pixels import to_bytes


@dataclass(frozen=True, kw_only=True)
class JpegSize:
    """Minus the kilobytes of each image, or plus if ``maximize``; chroma is halved, as pillow does unless told."""

    in_thread: ClassVar[bool] = True

    quality: int = 95
    maximize: bool = False

    def __post_init__(self) -> None:
        # pillow takes more and means something else by it: above 95 files grow without looking better
        if not 1 <= self.quality <= 95:
            raise ValueError(f"reward.terms.jpeg.quality must lie in 1 to 95, got {self.quality}")

    def __call__(self, images_BCHW: Tensor, prompts: list[str]) -> Tensor:
        sign = 1.0 if self.maximize else -1.0
        return torch.tensor([sign * self._kilobytes(pixels_HWC) for pixels_HWC in to_bytes(images_BCHW)])

    def _kilobytes(self, pixels_HWC: np.ndarray) -> float:
        file = BytesIO()
        Image.fromarray(pixels_HWC).save(file, format="JPEG", quality=self.quality)
        return len(file.getvalue()) / 1000
