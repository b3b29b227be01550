"""Start noise from a distribution that is learned while the policy is: N(mean, std^2), a function of the condition.

The piece says how it is learned and which groups keep plain noise; the network that gives mean and std is in
``fastgrpo/proposal``, and a draw brings what it says.  Letters: P prompts, p of them on this rank, G samples of each,
B samples of this rank.
"""

import math
from dataclasses import dataclass

import torch

from fastgrpo.algorithm.noise import DECISION_STREAM, START_STREAM, NoiseDraw, Score
from fastgrpo.on_device import on_device
from fastgrpo.types import Noise


@dataclass(frozen=True, kw_only=True)
class LearnedNoise:
    """Adaptive start noise, named as future work by Smart-GRPO (arXiv:2510.02654); learned by the score function.

    max_kl         nats of KL(N(mean, std^2) || N(0, I)) that no image's start noise reaches, summed over its elements
    learning_rate  of Adam, one step an iteration
    width          of the network's hidden layer
    cells          rows and columns of the map that it gives, which is interpolated to the latent's
    learns_std     whether the std is learned beside the mean; else it is one number, which keeps the noise's norm
    mix            share of the prompts that keep plain noise, from which nothing is learned for it
    """

    max_kl: float = 10.0
    learning_rate: float = 2e-3
    width: int = 64
    cells: int = 8
    learns_std: bool = False
    mix: float = 0.0

    def __post_init__(self) -> None:
        for field in ("max_kl", "learning_rate"):
            if not 0 < getattr(self, field) < math.inf:
                raise ValueError(
                    f"algorithm.noise.{field} must be positive and finite, got {getattr(self, field)}; use "
                    "algorithm/noise=gaussian for plain noise"
                )
        for field in ("width", "cells"):
            if getattr(self, field) < 1:
                raise ValueError(
                    f"algorithm.noise.{field} must be at least 1, got {getattr(self, field)}; {LearnedNoise.width} and "
                    f"{LearnedNoise.cells} are the default width and cells"
                )
        if not 0 <= self.mix < 1:
            raise ValueError(
                f"algorithm.noise.mix must lie in [0, 1), got {self.mix}; use algorithm/noise=gaussian for plain noise"
            )

    def __call__(self, draw: NoiseDraw, score: Score) -> Noise:
        learned_P = tuple(u >= self.mix for u in draw.uniform(DECISION_STREAM))
        prompts_B = [row // draw.group_size for row in draw.own_rows]
        own_p = sorted(set(prompts_B))
        mean_pCHW, std_pCHW = draw.moments(own_p, draw.latent_shape)
        is_learned_p = on_device(torch.tensor([learned_P[place] for place in own_p]), draw.device)[:, None, None, None]
        # with mean 0 and std 1 noise is the plain one to the bit
        mean_pCHW = torch.where(is_learned_p, mean_pCHW, 0.0)
        std_pCHW = torch.where(is_learned_p, std_pCHW, 1.0)
        places_B = on_device(torch.tensor([own_p.index(place) for place in prompts_B]), draw.device)
        start_BCHW = draw.around(START_STREAM, mean_pCHW[places_B], std_pCHW[places_B])
        return Noise(start_BCHW, metrics={}, num_scored=0, learned_P=learned_P)
