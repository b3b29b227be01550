"""Golden pairs: fixed images and prompts that every reward is tried on before a run pays for it.

``scenes`` are drawings of the shapes world, as prompted, with a wrong prompt, and noise; ``texts`` are written words.
Letters: B images.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

_DIRECTORY = Path(__file__).parent / "golden_set"


@dataclass(frozen=True)
class GoldenSet:
    """Images [B, 3, H, W] in [0, 1] and one prompt an image."""

    name: str
    images_BCHW: Tensor
    prompts: list[str]


@cache
def golden_sets() -> list[str]:
    """Their names."""
    return sorted(path.name for path in _DIRECTORY.iterdir() if path.is_dir())


@cache
def golden_set(name: str = "scenes") -> GoldenSet:
    """The pairs in ``golden_set/<name>/``: 0.png, 1.png, ... a line of prompts.txt each.  ValueError for no such."""
    directory = _DIRECTORY / name
    if name not in golden_sets():
        raise ValueError(f"there is no golden set {name!r}; use one of {', '.join(golden_sets())}, or none")
    prompts = (directory / "prompts.txt").read_text(encoding="utf-8").splitlines()
    images = [np.array(Image.open(directory / f"{row}.png").convert("RGB")) for row in range(len(prompts))]
    pixels_BHWC = torch.from_numpy(np.stack(images))
    return GoldenSet(name, pixels_BHWC.permute(0, 3, 1, 2).float().div(255).contiguous(), prompts)
