"""Candidates for the noise of one step, of each sample or of each group, drawn again where they are needed again.

Letters: P prompts, G samples of a prompt, B samples of this rank, M candidates that a sample scores, X of any number,
C H W of a latent.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fastgrpo.on_device import on_device
from fastgrpo.types import Samples
from fastgrpo_kernels import sample_candidates


@dataclass(frozen=True)
class StepDraw:
    """Noise of one step of this rank's samples, a function of seed, stream, prompt id, place in the group and number.

    Candidate k of the sample at place g has the id g + G k, so that the first is the step's plain noise.
    """

    seed: int
    stream: int
    samples: Samples
    latent_shape: tuple[int, int, int]
    device: torch.device | str = "cpu"

    @property
    def group_size(self) -> int:
        return self.samples.group_size

    @property
    def num_samples(self) -> int:
        """Of all ranks."""
        return len(self.samples.prompts) * self.group_size

    @property
    def standard(self) -> tuple[Tensor, Tensor]:
        """The moments of N(0, 1), for each of this rank's samples."""
        mean_BCHW = torch.zeros(len(self.samples), *self.latent_shape, device=self.device)
        return mean_BCHW, torch.ones_like(mean_BCHW)

    @cached_property
    def rows_B(self) -> Tensor:
        return on_device(self.samples.rows, self.device)

    @cached_property
    def prompt_ids_B(self) -> Tensor:
        return on_device(self.samples.prompt_ids, self.device)

    @cached_property
    def places_B(self) -> Tensor:
        return on_device(self.samples.places, self.device)


@dataclass(frozen=True)
class StepCandidates:
    """``num`` noises that each of this rank's samples scores, from the ``first`` on, not drawn yet: N(mean, std^2)."""

    draw: StepDraw
    first: int
    num: int
    moments: tuple[Tensor, Tensor]

    def at(self, rows: Sequence[int]) -> Tensor:
        """Those of some of the samples, by their places among this rank's: float32 [len(rows), M, C, H, W]."""
        numbers_M = torch.arange(self.first, self.first + self.num, device=self.draw.device)
        ids_BM = self.draw.places_B[:, None] + self.draw.group_size * numbers_M
        return self._drawn(ids_BM, on_device(rows, self.draw.device))

    def of_ids(self, ids_BX: Tensor) -> Tensor:
        """Noises by their ids, [B, X, C, H, W]."""
        return self._drawn(ids_BX, torch.arange(len(ids_BX), device=self.draw.device))

    def _drawn(self, ids_BX: Tensor, rows: Tensor) -> Tensor:
        mean_BCHW, std_BCHW = self.moments
        where = (self.draw.seed, self.draw.stream, self.draw.prompt_ids_B[rows])
        return sample_candidates(mean_BCHW[rows], std_BCHW[rows], *where, ids_BX[rows])
