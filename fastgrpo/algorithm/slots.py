"""The noises of images that are searched, each on its own: functions of ids, whatever else is made beside them.

Letters: S images, K candidates of each, C H W of a latent.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastgrpo.algorithm.noise import CANDIDATE_STREAM, Candidates, NoiseDraw

# a candidate's id is its number times this, plus its image's place among those of the prompt
_MOST_IMAGES = 2**16
MOST_CANDIDATES = 2**15


@dataclass(frozen=True)
class Slots:
    """The noises of S images, the ``rows`` of ``draw``; ``stream`` is that of their plain noise.

    Candidate k of an image is a function of (seed, prompt id, place among the prompt's images, k).
    """

    draw: NoiseDraw
    stream: int

    def __post_init__(self) -> None:
        if self.draw.group_size > _MOST_IMAGES:
            raise ValueError(
                f"a search makes at most {_MOST_IMAGES} images of a prompt, got {self.draw.group_size}; lower "
                "images_per_prompt"
            )

    def noises(self, num: int) -> Tensor:
        """Candidates 0 to ``num`` - 1 from N(0, 1), float32 [S, num, C, H, W]; number 0 is the plain noise."""
        plain_SCHW = self.draw.starts(self.stream)
        if num == 1:
            return plain_SCHW[:, None]
        others = self.of_round(0)
        return torch.cat([plain_SCHW[:, None], drawn(others, self.ids(1, num))], dim=1)

    def of_round(self, number: int, moments: tuple[Tensor, Tensor] | None = None) -> Candidates:
        """The candidates of a round, a row of ``moments`` for each image; round 0 is that of ``noises``."""
        prompts = [row // self.draw.group_size for row in self.draw.own_rows]
        return Candidates(self.draw, CANDIDATE_STREAM + number, MOST_CANDIDATES, prompts, moments)

    def ids(self, first: int, stop: int) -> Tensor:
        """Of the candidates ``first`` to ``stop`` - 1 of each image, int64 [S, K]."""
        if stop > MOST_CANDIDATES:
            raise ValueError(f"a search has at most {MOST_CANDIDATES} candidates, got {stop}; lower budget")
        numbers_K = torch.arange(first, stop, dtype=torch.int64, device=self.draw.device)
        return self.draw.places_B[:, None] + _MOST_IMAGES * numbers_K


def drawn(candidates: Candidates, ids_SK: Tensor) -> Tensor:
    """The noises of these ids, float32 [S, K, C, H, W]."""
    slots_B = torch.arange(len(ids_SK), device=ids_SK.device).repeat_interleave(ids_SK.shape[1])
    return candidates.at(slots_B, ids_SK.flatten()).unflatten(0, ids_SK.shape)
