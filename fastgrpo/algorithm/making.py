"""What a search at sampling is: it plans for one image, and is called with images in the making.

Letters: S images being made, each with a search of its own, K candidates of each, C H W of a latent.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastgrpo.algorithm.ranking import best_first
from fastgrpo.algorithm.slots import Slots


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a search does for one image: its candidates, the velocities it takes, the images it decodes and scores."""

    candidates: int
    velocities: int
    scored: int


@dataclass(frozen=True)
class Found:
    """The best image of each search, float32 [S, 3, height, width], and its reward."""

    images_SCHW: Tensor
    scores_S: Tensor


class Making(Protocol):
    """S images in the making, and what a search of them may ask for; all scores are of rewards to be maximized."""

    @property
    def slots(self) -> Slots:
        """Their noises."""

    @property
    def num_steps(self) -> int:
        """Of an image that is made in full."""

    @property
    def velocities(self) -> int:
        """That each image may take."""

    def estimates(self, noise_SKCHW: Tensor, num_steps: int) -> Tensor:
        """Scores [S, K] of the images that a few Euler steps lead to; each takes ``num_steps`` velocities."""

    def run(self, x_SKCHW: Tensor, steps: range) -> Tensor:
        """Latents after some steps of the grid."""

    def look(self, x_SKCHW: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Latents after one step, and scores [S, K] of the x_0 that its velocity points to."""

    def best(self, x_SKCHW: Tensor, steps: range) -> Found:
        """The best, of each S, of the images that the last steps lead to."""


class Search(Protocol):
    """A way to spend velocities on finding an image.

    ``plan`` is of one image that may take at least ``num_steps`` velocities; a call must keep to it.
    """

    def plan(self, velocities: int, num_steps: int) -> Plan: ...

    def __call__(self, making: Making) -> Found: ...


def best_of(x_SKCHW: Tensor, scores_SK: Tensor, num: int) -> Tensor:
    """The best ``num`` of each, in the order that they had."""
    return taken(x_SKCHW, best_first(scores_SK)[:, :num].sort(dim=1).values)


def taken(x_SKCHW: Tensor, places_SK: Tensor) -> Tensor:
    """Those at the places, of each."""
    slots_S1 = torch.arange(len(x_SKCHW), device=x_SKCHW.device)[:, None]
    return x_SKCHW[slots_S1, places_SK]
