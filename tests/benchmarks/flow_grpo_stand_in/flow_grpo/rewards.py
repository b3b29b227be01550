"""The one reward that the benchmark asks for: how small the JPEG of an image is."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

_KILOBYTES = 500


def multi_score(device: torch.device, score_dict: Mapping[str, float]) -> Callable[..., Any]:
    """What scores images, by name and in sum, under ``avg``."""
    ((name, weight),) = score_dict.items()
    assert name == "jpeg_compressibility"

    def score(images: Tensor, prompts: Sequence[str], metadata: object, only_strict: bool = True) -> Any:
        scores = [-_kilobytes(image) / _KILOBYTES for image in images]
        return {name: scores, "avg": [weight * one for one in scores]}, {}

    return score


def _kilobytes(image_CHW: Tensor) -> float:
    pixels = (255 * image_CHW).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=95)
    return len(buffer.getvalue()) / 1000
