"""Start noise: where the trajectories of an iteration begin.

A proposal is called with a ``NoiseDraw``, its only source of randomness, and with a function ``score`` that estimates
the reward of candidates; it hands on the start noise of each sample.  On several ranks every rank asks for the same
scores, which they compute together, and hands on the noises of its own samples: noise is drawn again, never sent.
Searching where to start leaves every log_prob untouched.  The searches are in ``search.py``.
Letters: P prompts, G samples of a prompt, K candidates, B samples of this rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from fastgrpo.on_device import on_device
from fastgrpo.types import Conditions, Noise
from fastgrpo_kernels import philox_normal, refit_moments, sample_candidates

# what the streams of the counter-based generator are for; a search round r draws from SEARCH_STREAM + r, the noise of
# step j from STEP_STREAM + j, that of draw k of an iteration's images from MATCHING_STREAM + k, round r of a search at
# sampling from CANDIDATE_STREAM + r
START_STREAM = 0
SEARCH_STREAM = 1
STEP_STREAM = 1000
DECISION_STREAM = 2000
CHOICE_STREAM = 2001
EVALUATION_STREAM = 3000
MATCHING_STREAM = 4000
CANDIDATE_STREAM = 5000

# (places of some prompts among a draw's, (C, H, W)) -> mean and std of each, float32 [p, C, H, W]
Moments = Callable[[Sequence[int], Sequence[int]], tuple[Tensor, Tensor]]


def plain_moments(places: Sequence[int], latent_shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """N(0, I)."""
    mean_pCHW = torch.zeros(len(places), *latent_shape)
    return mean_pCHW, torch.ones_like(mean_pCHW)


@dataclass(frozen=True)
class NoiseDraw:
    """Standard normal noise as a function of global indices, so any number of GPUs draws the same for a prompt.

    ``rows`` are the samples, of all P * G, whose start noise is wanted; None is all of them.  ``moments`` are what has
    been learned of the prompts.
    """

    seed: int
    prompt_ids: list[int]
    group_size: int
    latent_shape: tuple[int, int, int]
    device: torch.device | str = "cpu"
    iteration: int = 0
    num_iterations: int = 1
    rows: tuple[int, ...] | None = None
    moments: Moments = field(default=plain_moments, compare=False)

    def starts(self, stream: int, *, is_shared: bool = False) -> Tensor:
        """One noise for each of ``rows``, float32 [B, C, H, W]; all of a prompt its first one if ``is_shared``."""
        places_B = torch.zeros_like(self.places_B) if is_shared else self.places_B
        return self.of_pairs(stream, self.prompts_B, places_B)

    def around(self, stream: int, mean_BCHW: Tensor, std_BCHW: Tensor) -> Tensor:
        """mean + std * the noise of ``starts``, for each of ``rows``."""
        ids_B, places_B = self.ids_P[self.prompts_B], self.places_B[:, None]
        return sample_candidates(mean_BCHW, std_BCHW, self.seed, stream, ids_B, places_B)[:, 0]

    def of_pairs(self, stream: int, prompts_B: Tensor, ids_B: Tensor) -> Tensor:
        """Noise ``ids_B[b]`` of the prompt at place ``prompts_B[b]``, float32 [B, C, H, W]."""
        numel = self.latent_shape[0] * self.latent_shape[1] * self.latent_shape[2]
        noise = philox_normal(self.seed, stream, self.ids_P[prompts_B], ids_B[:, None], numel)
        return noise.view(-1, *self.latent_shape)

    @cached_property
    def prompts_B(self) -> Tensor:
        """For each of ``rows``, which of the P prompts it belongs to."""
        return self._rows_B // self.group_size

    @cached_property
    def places_B(self) -> Tensor:
        """The place of each of ``rows`` in its group."""
        return self._rows_B % self.group_size

    @cached_property
    def _rows_B(self) -> Tensor:
        return on_device(torch.tensor(self.own_rows, dtype=torch.int64), self.device)

    @property
    def own_rows(self) -> tuple[int, ...]:
        """``rows``, or all."""
        return tuple(range(len(self.prompt_ids) * self.group_size)) if self.rows is None else self.rows

    def __call__(self, stream: int, num: int, first: int = 0) -> Tensor:
        """Noises ``first`` ... ``first + num - 1`` of a stream, float32 [P, num, C, H, W]."""
        channels, height, width = self.latent_shape
        ids_K = torch.arange(first, first + num, dtype=torch.int64, device=self.device)
        noise = philox_normal(self.seed, stream, self.ids_P, ids_K, channels * height * width)
        return noise.view(len(self.prompt_ids), num, channels, height, width)

    @cached_property
    def ids_P(self) -> Tensor:
        """The global ids of the prompts."""
        return on_device(torch.tensor(self.prompt_ids, dtype=torch.int64), self.device)

    def uniform(self, stream: int) -> list[float]:
        """One number in (0, 1) for each prompt, a function of (seed, stream, prompt id, iteration)."""
        # on the CPU, so that a decision made with it neither waits for the GPU nor depends on it
        ids, iteration = torch.tensor(self.prompt_ids, dtype=torch.int64), torch.tensor([self.iteration])
        return torch.special.ndtr(philox_normal(self.seed, stream, ids, iteration, 1)[:, 0, 0].double()).tolist()


@dataclass(frozen=True)
class Candidates:
    """K noises of each of some prompts of a draw, not drawn yet: N(mean, std^2), or N(0, 1) where these are None.

    ``prompts`` are places among the draw's prompts; moments have a row each.
    """

    draw: NoiseDraw
    stream: int
    num: int
    prompts: Sequence[int]
    moments: tuple[Tensor, Tensor] | None = None

    @property
    def prompt_ids(self) -> list[int]:
        return [self.draw.prompt_ids[place] for place in self.prompts]

    def at(self, prompts_B: Tensor, ids_B: Tensor) -> Tensor:
        """Candidate ``ids_B[b]`` of the prompt ``prompts_B[b]``, counted among ``prompts``: float32 [B, C, H, W]."""
        if len(prompts_B) == 0:
            return torch.empty(0, *self.draw.latent_shape, device=self.draw.device)
        places_B = self.prompts_P[prompts_B]
        if self.moments is None:
            return self.draw.of_pairs(self.stream, places_B, ids_B)
        mean_PCHW, std_PCHW = self.moments
        drawn = sample_candidates(
            mean_PCHW[prompts_B],
            std_PCHW[prompts_B],
            self.draw.seed,
            self.stream,
            self.draw.ids_P[places_B],
            ids_B[:, None],
        )
        return drawn[:, 0]

    def rows(self, rows: Sequence[int]) -> Tensor:
        """Some of the P * K, prompt by prompt."""
        rows_B = on_device(torch.tensor(list(rows), dtype=torch.int64), self.draw.device)
        return self.at(rows_B // self.num, rows_B % self.num)

    def all(self) -> Tensor:
        """Every one, float32 [P, K, C, H, W]."""
        return self.rows(range(len(self.prompts) * self.num)).unflatten(0, (len(self.prompts), self.num))

    def refit(
        self, elites_PT: Tensor, weights_PT: Tensor, *, momentum: float, std_floor: float, project: bool
    ) -> tuple[Tensor, Tensor]:
        """Mean and std of the elites, which are drawn again for it."""
        assert self.moments is not None
        return refit_moments(
            *self.moments,
            self.draw.seed,
            self.stream,
            self.draw.ids_P[self.prompts_P],
            elites_PT,
            weights_PT,
            momentum=momentum,
            std_floor=std_floor,
            project=project,
        )

    @cached_property
    def prompts_P(self) -> Tensor:
        """``prompts``, on the device."""
        return on_device(torch.tensor(list(self.prompts), dtype=torch.int64), self.draw.device)


# (candidates, estimate_steps) -> rewards_PK
Score = Callable[[Candidates, int], Tensor]


def plain_noise(draw: NoiseDraw) -> Tensor:
    """N(0, I) for every sample: float32 [B, C, H, W]."""
    return draw.starts(START_STREAM)


# (draw, stream, conditions of its rows) -> the start noise of each of them: that of a learned proposal, or plain
Starts = Callable[[NoiseDraw, int, Conditions], Tensor]


def plain_starts(draw: NoiseDraw, stream: int, conditions_B: Conditions) -> Tensor:
    """N(0, I), whatever the prompt: float32 [B, C, H, W]."""
    return draw.starts(stream)


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
        return Noise(draw.starts(START_STREAM, is_shared=True), metrics={}, num_scored=0, is_shared=True)


def rank_correlation(a_PG: Tensor, b_PG: Tensor) -> float:
    """Spearman's correlation within each prompt, ties given their mean rank, averaged over prompts.

    A prompt where either is constant or not finite has no correlation and is left out; NaN if none remains.
    """
    ranks_a, ranks_b = _ranks(a_PG), _ranks(b_PG)
    correlation_P = (ranks_a * ranks_b).sum(dim=1) / (ranks_a.norm(dim=1) * ranks_b.norm(dim=1))
    finite_P = torch.isfinite(a_PG).all(dim=1) & torch.isfinite(b_PG).all(dim=1) & torch.isfinite(correlation_P)
    return torch.where(finite_P, correlation_P, torch.nan).nanmean().item()


def _ranks(values_PG: Tensor) -> Tensor:
    """Ranks minus their mean, float64 [P, G]."""
    above = (values_PG[:, :, None] > values_PG[:, None, :]).sum(dim=2)
    below = (values_PG[:, :, None] < values_PG[:, None, :]).sum(dim=2)
    return 0.5 * (above - below).double()
