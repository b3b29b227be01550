"""Golden pairs: fixed images and prompts that every reward is tried on before a run pays for it.

``scenes`` are drawings of the shapes world, as prompted, with a wrong prompt, and noise; ``texts`` are written words.
Letters: B images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastgrpo.types import Prompt, as_prompts, prompts_of

_DIRECTORY = Path(__file__).parent / "golden_set"


@dataclass(frozen=True)
class GoldenSet:
    """Images [B, 3, H, W] in [0, 1] and one prompt an image, with as many ``metadata`` if the reward asks for them.

    is_known: whether the images were made for the prompts, so that a reward should tell them apart, and as it did.
    """

    name: str
    images_BCHW: Tensor
    prompts: list[str]
    metadata: Sequence[Mapping[str, Any]] = ()
    is_known: bool = True

    @property
    def asked(self) -> list[Prompt]:
        return prompts_of(self.prompts, self.metadata)


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


def with_prompts(prompts: Sequence[Prompt | str]) -> GoldenSet | None:
    """The images of ``scenes`` and a run's own prompts, its first ones over and over; None where it has none."""
    images_BCHW, asked = golden_set().images_BCHW, as_prompts(prompts[: len(golden_set().prompts)])
    if not asked:
        return None
    of_images = [asked[row % len(asked)] for row in range(len(images_BCHW))]
    texts, metadata = [prompt.text for prompt in of_images], [prompt.metadata for prompt in of_images]
    return GoldenSet("prompts", images_BCHW, texts, metadata, is_known=False)
