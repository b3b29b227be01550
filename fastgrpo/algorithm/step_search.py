"""The search inside a trajectory: which noise a stochastic step takes, by the rewards of where candidates lead.

    z_k = mean + std eps_k,   eps_k ~ N(mu, sigma^2)        mean, std of the step; mu = 0, sigma = 1 at first

A few steps lead from z_k to an image, the elites refit N(mu, sigma^2), and its mean is the step's noise: the second way
in which Smart-GRPO's text (arXiv:2510.02654) can be read, beside the start noises of ``search.py``.  A chosen noise is
no sample of the policy, which moves its log_prob; ``correction`` says what becomes of that.
Letters: P prompts, G samples of a prompt, A = P * G samples of all ranks, B of this rank, M candidates that a sample
scores, S searches of K candidates each, which N samples take their noise from, T elites, C H W of a latent.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastgrpo.algorithm.noise import CHOICE_STREAM, GaussianNoise, NoiseDraw, Score, SharedNoise
from fastgrpo.algorithm.ranking import best_first, finite
from fastgrpo.algorithm.step_candidates import StepCandidates, StepDraw
from fastgrpo.on_device import on_device
from fastgrpo.settings import at_least, one_of
from fastgrpo.types import ChosenNoise, Noise
from fastgrpo_kernels import elite_weights, philox_normal, refit_moments


@dataclass(frozen=True, kw_only=True)
class StepSearch:
    """Plain start noise, and a search for the noise of the first trained step of each trajectory.

    candidates    that each sample scores in a round, M
    shares_start  the group starts from one noise (DanceGRPO) and is searched as one, with K = G M candidates; else each
                  sample has a search of its own, with K = M
    take          ``mean``: that of the refitted distribution (the paper); ``elites``: the best seen, to each sample of
                  a group that is searched as one another; ``fresh``: drawn from the refitted distribution; ``drawn``:
                  drawn from the candidates by p = (1 - floor) softmax(score / temperature) + floor / K, of scores of
                  mean 0 and standard deviation 1
    project       ``sphere``: the mean is rescaled to norm sqrt(d), which candidates have; ``none``: the paper
    correction    ``none``: the step is trained as if its noise were a sample (the paper); ``weights``: its advantage is
                  multiplied by (1 / K) / p, so that the mean over the draw is that over candidates that nobody chose;
                  ``imitate``: its advantage is ``imitation``, whatever the image is worth
    momentum, std_floor   of a refit: the share of the old mean and std that it keeps, the least std

    ``weights`` undo the choice of this step's noise alone: advantages are those of the images that were made, and later
    steps see the states that it led to.
    """

    target: Literal["start", "step"] = "step"
    rounds: int = 1
    candidates: int = 4
    elites: int = 3
    estimate_steps: int = 1
    shares_start: bool = False
    take: Literal["mean", "elites", "fresh", "drawn"] = "drawn"
    project: Literal["none", "sphere"] = "none"
    temperature: float = 1.0
    floor: float = 0.2
    momentum: float = 0.0
    std_floor: float = 0.0
    correction: Literal["none", "weights", "imitate"] = "weights"
    imitation: float = 1.0

    def __post_init__(self) -> None:
        if self.target != "step":
            raise ValueError(
                f"algorithm.noise.target must be step in this search, got {self.target!r}; use algorithm/noise=elite "
                "or elite_paper to search start noises"
            )
        for name in ("rounds", "candidates", "elites", "estimate_steps"):
            at_least(f"algorithm.noise.{name}", getattr(self, name), 1)
        one_of("algorithm.noise.take", self.take, ("mean", "elites", "fresh", "drawn"))
        one_of("algorithm.noise.project", self.project, ("none", "sphere"))
        one_of("algorithm.noise.correction", self.correction, ("none", "weights", "imitate"))
        _check_range("temperature", self.temperature, 0.0 < self.temperature < torch.inf, "positive and finite")
        _check_range("floor", self.floor, 0.0 <= self.floor <= 1.0, "in [0, 1]")
        _check_range("momentum", self.momentum, 0.0 <= self.momentum < 1.0, "in [0, 1)")
        _check_range("std_floor", self.std_floor, 0.0 <= self.std_floor < torch.inf, "finite and not negative")
        _check_range("imitation", self.imitation, 0.0 < self.imitation < torch.inf, "positive and finite")
        if self.project == "sphere" and self.take != "mean":
            raise ValueError(f"algorithm.noise.project=sphere rescales the mean, got take={self.take}; use take=mean")
        if self.take == "drawn" and self.rounds > 1:
            raise ValueError(
                f"algorithm.noise.take=drawn draws from candidates of the policy, which those of later rounds are not, "
                f"got rounds={self.rounds}; use rounds=1 and more candidates"
            )
        if self.correction == "weights" and (self.take != "drawn" or self.floor == 0):
            raise ValueError(
                f"algorithm.noise.correction=weights divides by the probability of the noise that was drawn, got "
                f"take={self.take} and floor={self.floor}; use take=drawn with a floor above 0"
            )

    def __call__(self, draw: NoiseDraw, score: Score) -> Noise:
        """Plain start noise: nothing of it is searched."""
        return SharedNoise()(draw, score) if self.shares_start else GaussianNoise()(draw, score)

    @property
    def gives_one_noise(self) -> bool:
        """Whether all samples of a group take the same, from the same start."""
        return self.shares_start and self.take == "mean"

    def check_group(self, group_size: int) -> None:
        """ValueError if a search has fewer candidates than it is to have elites."""
        num = self.candidates * group_size if self.shares_start else self.candidates
        is_refitted = self.rounds > 1 or self.take in ("mean", "fresh")
        if is_refitted and self.elites > num:
            raise ValueError(
                f"algorithm.noise.elites must be at most the {num} candidates of a search, got {self.elites}; lower "
                "it, or raise algorithm.noise.candidates"
            )

    def choose(self, draw: StepDraw, score: "StepScore") -> ChosenNoise:
        """The noise of the step of each of this rank's samples, and what becomes of its advantage."""
        self.check_group(draw.group_size)
        num = self.candidates
        rounds: list[StepCandidates] = []
        scores: list[Tensor] = []
        moments = draw.standard
        for r in range(self.rounds):
            rounds.append(StepCandidates(draw, num * r, num, moments))
            scores.append(self._searches(finite(score(rounds[-1], self.estimate_steps)), draw))
            if self.take in ("mean", "fresh") or r < self.rounds - 1:
                moments = self._refitted(rounds[-1], scores[-1], is_last=r == self.rounds - 1)
        plain = scores[0].mean()
        weights_A = torch.ones(draw.num_samples, device=draw.device)
        if self.take in ("mean", "fresh"):
            mean_BCHW, std_BCHW = moments
            std_BCHW = torch.zeros_like(std_BCHW) if self.take == "mean" else std_BCHW
            found = StepCandidates(draw, num * self.rounds, 1, (mean_BCHW, std_BCHW))
            if self.gives_one_noise:
                # scored by none of the group: what is known of it are its elites
                estimates_A = scores[-1].topk(self.elites, dim=1).values.mean(dim=1)
            else:
                estimates_A = finite(score(found, self.estimate_steps))[:, 0]
            noise_BCHW = found.at(range(len(draw.samples)))[:, 0]
        else:
            seen_SX = torch.cat(scores, dim=1)
            num_taken = draw.group_size if self.shares_start else 1
            if self.take == "drawn":
                p_SK = self.probabilities(seen_SX)
                picked_SN = drawn(p_SK, on_device(self._uniforms(draw), draw.device), num_taken)
                weights_A = (1.0 / (p_SK.shape[1] * p_SK.gather(1, picked_SN))).flatten().float()
            else:
                picked_SN = best_first(seen_SX)[:, :num_taken]
            estimates_A = seen_SX.gather(1, picked_SN).flatten()
            noise_BCHW = self._picked(rounds, picked_SN.flatten()[draw.rows_B])
        metrics = {"search/gain": (estimates_A.mean() - plain).item()}
        if self.correction == "weights":
            metrics["search/effective_share"] = (weights_A.mean().square() / weights_A.square().mean()).item()
        return ChosenNoise(
            noise_BCHW,
            *self._corrections(weights_A[draw.rows_B]),
            estimates_PG=None if self.gives_one_noise else estimates_A.view(-1, draw.group_size),
            metrics=metrics,
        )

    def probabilities(self, scores_SK: Tensor) -> Tensor:
        """Of each candidate to be drawn, float64 [S, K]; all alike where all scores are."""
        scores_SK = scores_SK.double()
        std_S1 = scores_SK.std(dim=1, keepdim=True, correction=0)
        soft_SK = torch.softmax(scores_SK / (self.temperature * std_S1).clamp_min(1e-12), dim=1)
        return (1.0 - self.floor) * soft_SK + self.floor / scores_SK.shape[1]

    def _corrections(self, weights_B: Tensor) -> tuple[Tensor, Tensor]:
        """(scale, offset) of the advantage in the searched step."""
        if self.correction == "imitate":
            return torch.zeros_like(weights_B), torch.full_like(weights_B, self.imitation)
        ones_B = torch.ones_like(weights_B)
        return weights_B if self.correction == "weights" else ones_B, torch.zeros_like(weights_B)

    def _searches(self, scores_AM: Tensor, draw: StepDraw) -> Tensor:
        """Those of each search, [S, K]: of a sample, or of a group, whose K candidates its samples scored by turns."""
        if not self.shares_start:
            return scores_AM
        return scores_AM.view(-1, draw.group_size, scores_AM.shape[1]).transpose(1, 2).flatten(1)

    def _refitted(self, candidates: StepCandidates, scores_SK: Tensor, *, is_last: bool) -> tuple[Tensor, Tensor]:
        draw = candidates.draw
        elites_ST = best_first(scores_SK)[:, : self.elites]
        return refit_moments(
            *candidates.moments,
            draw.seed,
            draw.stream,
            draw.prompt_ids_B,
            self._ids(candidates, elites_ST[self._search_of(draw)]),
            elite_weights(scores_SK.gather(1, elites_ST))[self._search_of(draw)],
            momentum=self.momentum,
            std_floor=self.std_floor,
            project=self.project == "sphere" and is_last,
        )

    def _picked(self, rounds: list[StepCandidates], picked_B: Tensor) -> Tensor:
        """Of each sample the candidate with this number in its search, all rounds numbered through."""
        num = rounds[0].num * (rounds[0].draw.group_size if self.shares_start else 1)
        round_B, numbers_B1 = picked_B // num, picked_B[:, None] % num
        found_BCHW = rounds[0].of_ids(self._ids(rounds[0], numbers_B1))[:, 0]
        for r, candidates in enumerate(rounds[1:], start=1):
            of_round_BCHW = candidates.of_ids(self._ids(candidates, numbers_B1))[:, 0]
            is_here_B = round_B == r
            found_BCHW = torch.where(is_here_B[:, None, None, None], of_round_BCHW, found_BCHW)
        return found_BCHW

    def _ids(self, candidates: StepCandidates, numbers_BX: Tensor) -> Tensor:
        """Ids of the noise of candidates, by their numbers in each sample's search."""
        draw = candidates.draw
        if self.shares_start:
            return numbers_BX + draw.group_size * candidates.first
        return draw.places_B[:, None] + draw.group_size * (candidates.first + numbers_BX)

    def _search_of(self, draw: StepDraw) -> Tensor:
        """Which search each of this rank's samples belongs to."""
        return draw.rows_B // draw.group_size if self.shares_start else draw.rows_B

    def _uniforms(self, draw: StepDraw) -> Tensor:
        """One number in (0, 1) a search, float64 [S, 1], on the CPU: equal on every device."""
        ids_P = torch.tensor(draw.samples.prompts.ids, dtype=torch.int64)
        places = torch.arange(1 if self.shares_start else draw.group_size)
        normal_PG1 = philox_normal(draw.seed, CHOICE_STREAM, ids_P, places, 1)
        return torch.special.ndtr(normal_PG1.double()).view(-1, 1)


# (candidates, estimate_steps) -> their rewards, those of all ranks' samples: [A, M]
StepScore = Callable[[StepCandidates, int], Tensor]


def drawn(p_SK: Tensor, u_S1: Tensor, num: int) -> Tensor:
    """Which candidates are drawn, [S, N]: candidate k num * p_k times in the mean over u, which is even in (0, 1).

    Systematic sampling: ``num`` points, 1 / num apart, on the running sum of p.  One at a time it is a plain draw.
    """
    points_SN = (torch.arange(num, device=p_SK.device) + u_S1) / num
    return torch.searchsorted(p_SK.cumsum(dim=1), points_SN, right=True).clamp_max(p_SK.shape[1] - 1)


def _check_range(name: str, value: float, is_in: bool, range_: str) -> None:
    if not is_in:
        default = StepSearch.__dataclass_fields__[name].default
        raise ValueError(f"algorithm.noise.{name} must be {range_}, got {value}; {default} is usual")
