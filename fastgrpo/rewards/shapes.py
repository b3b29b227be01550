"""The verifier of the shapes world as a reward: does the image show what its caption says?  In [0, 1]."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastgrpo.shapes.verifier import verify
from fastgrpo.shapes.world import IMAGE_SIZE, parse_caption


@dataclass(frozen=True, kw_only=True)
class ShapesReward:
    """Graded for training: the share of the caption that is there.  ``strict`` for evaluation: 1 if all is, else 0."""

    in_thread: ClassVar[bool] = True

    strict: bool = False

    def __call__(self, images_BCHW: Tensor, prompts: list[str]) -> Tensor:
        if images_BCHW.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(
                f"reward=shapes verifies images [3, {IMAGE_SIZE}, {IMAGE_SIZE}], got {list(images_BCHW.shape[1:])}; "
                "use model=shapes with it, or another reward"
            )
        images_BHWC = images_BCHW.float().permute(0, 2, 3, 1).cpu().numpy()
        scores = [verify(image, parse_caption(text)) for image, text in zip(images_BHWC, prompts, strict=True)]
        return torch.tensor([strict if self.strict else graded for graded, strict in scores])

    def check_prompt(self, prompt: str) -> None:
        """ValueError for a sentence that the shapes world does not speak."""
        parse_caption(prompt)
