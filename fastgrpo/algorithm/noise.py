"""Start noise: where the trajectories of an iteration begin.

A proposal is called with a ``NoiseDraw``, its only source of randomness, and with a function ``score`` that estimates
the reward of noises; it hands on G start noises a prompt.  Searching where to start leaves every log_prob untouched.
The searches are in ``search.py``.  Letters: P prompts, G samples of a prompt, K candidates, B = P * G.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fastgrpo.types import Noise
from fastgrpo_kernels import philox_normal, refit_moments, sample_candidates

# what the streams of the counter-based generator are for; a search round r draws from SEARCH_STREAM + r, the noise of
# step j from STEP_STREAM + j
START_STREAM = 0
SEARCH_STREAM = 1
STEP_STREAM = 1000
DECISION_STREAM = 2000
EVALUATION_STREAM = 3000

# (noise_PKCHW, estimate_steps, prompt_ids) -> rewards_PK; the P prompts may be some of the iteration's
Score = Callable[[Tensor, int, list[int]], Tensor]


@dataclass(frozen=True)
class NoiseDraw:
    """Standard normal noise as a function of global indices, so any number of GPUs draws the same for a prompt."""

    seed: int
    prompt_ids: list[int]
    group_size: int
    latent_shape: tuple[int, int, int]
    device: torch.device | str = "cpu"
    iteration: int = 0
    num_iterations: int = 1

    def __call__(self, stream: int, num: int, first: int = 0) -> Tensor:
        """Noises ``first`` ... ``first + num - 1`` of a stream, float32 [P, num, C, H, W]."""
        channels, height, width = self.latent_shape
        ids_K = torch.arange(first, first + num, dtype=torch.int64, device=self.device)
        noise = philox_normal(self.seed, stream, self._ids_P, ids_K, channels * height * width)
        return noise.view(len(self.prompt_ids), num, channels, height, width)

    def candidates(self, mean_PCHW: Tensor, std_PCHW: Tensor, stream: int, ids: Tensor) -> Tensor:
        """Draws from N(mean, std^2) by their ids, [K] for all prompts or [P, K]: float32 [P, K, C, H, W]."""
        return sample_candidates(mean_PCHW, std_PCHW, self.seed, stream, self._ids_P, ids)

    def refit(
        self,
        mean_PCHW: Tensor,
        std_PCHW: Tensor,
        stream: int,
        elites_PT: Tensor,
        weights_PT: Tensor,
        *,
        momentum: float,
        std_floor: float,
        project: bool,
    ) -> tuple[Tensor, Tensor]:
        """Mean and std of the elites of a stream's candidates, which are drawn again for it."""
        return refit_moments(
            mean_PCHW,
            std_PCHW,
            self.seed,
            stream,
            self._ids_P,
            elites_PT,
            weights_PT,
            momentum=momentum,
            std_floor=std_floor,
            project=project,
        )

    @cached_property
    def _ids_P(self) -> Tensor:
        return torch.tensor(self.prompt_ids, dtype=torch.int64).to(self.device, non_blocking=True)

    def uniform(self, stream: int) -> list[float]:
        """One number in (0, 1) for each prompt, a function of (seed, stream, prompt id, iteration)."""
        # on the CPU, so that a decision made with it neither waits for the GPU nor depends on it
        ids, iteration = torch.tensor(self.prompt_ids, dtype=torch.int64), torch.tensor([self.iteration])
        return torch.special.ndtr(philox_normal(self.seed, stream, ids, iteration, 1)[:, 0, 0].double()).tolist()


def plain_noise(draw: NoiseDraw) -> Tensor:
    """N(0, I) for every sample: float32 [B, C, H, W]."""
    return draw(START_STREAM, draw.group_size).flatten(0, 1)


NoiseProposal = Callable[[NoiseDraw, Score], Noise]


@dataclass(frozen=True)
class GaussianNoise:
    """Every sample starts from its own N(0, I): Flow-GRPO, arXiv:2505.05470."""

    def __call__(self, draw: NoiseDraw, score: Score) -> Noise:
        return Noise(plain_noise(draw), metrics={}, num_scored=0)


@dataclass(frozen=True)
class SharedNoise:
    """All samples of a prompt start from one N(0, I): DanceGRPO, arXiv:2505.07818."""

    def __call__(self, draw: NoiseDraw, score: Score) -> Noise:
        start_PGCHW = draw(START_STREAM, 1).repeat_interleave(draw.group_size, dim=1)
        return Noise(start_PGCHW.flatten(0, 1), metrics={}, num_scored=0, is_shared=True)


def rank_correlation(a_PG: Tensor, b_PG: Tensor) -> float:
    """Spearman's correlation within each prompt, ties given their mean rank, averaged over prompts.

    A prompt where either is constant or not finite has no correlation and is left out; NaN if none remains.
    """
    ranks_a, ranks_b = _ranks(a_PG), _ranks(b_PG)
    correlation_P = (ranks_a * ranks_b).sum(dim=1) / (ranks_a.norm(dim=1) * ranks_b.norm(dim=1))
    finite_P = torch.isfinite(a_PG).all(dim=1) & torch.isfinite(b_PG).all(dim=1) & torch.isfinite(correlation_P)
    return correlation_P[finite_P].mean().item()


def _ranks(values_PG: Tensor) -> Tensor:
    """Ranks minus their mean, float64 [P, G]."""
    above = (values_PG[:, :, None] > values_PG[:, None, :]).sum(dim=2)
    below = (values_PG[:, :, None] < values_PG[:, None, :]).sum(dim=2)
    return 0.5 * (above - below).double()
