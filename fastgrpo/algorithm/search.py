"""Noise searches: candidates are scored by the reward of an estimate of their image, and the good ones are kept.

Smart-GRPO (arXiv:2510.02654) fits N(mean, std^2), per prompt and latent element, to the best candidates of each round:
the cross-entropy method.  Candidates are functions of their ids and are drawn again where they are needed again.
Letters: P prompts, S of them that are searched, G samples of a prompt, K candidates, T elites, B samples of this rank,
C, H, W a latent, d = C * H * W.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from fastgrpo.algorithm.noise import (
    DECISION_STREAM,
    SEARCH_STREAM,
    START_STREAM,
    STEP_STREAM,
    Candidates,
    NoiseDraw,
    Score,
)
from fastgrpo.algorithm.ranking import best_first, finite
from fastgrpo.on_device import on_device
from fastgrpo.types import Noise
from fastgrpo_kernels import elite_weights

# each round has a stream of noise of its own, and so have draws from what the last one was fitted to
MAX_ROUNDS = STEP_STREAM - SEARCH_STREAM - 1


@dataclass(frozen=True, kw_only=True)
class EliteSearch:
    """Smart-GRPO's search, and what its paper leaves open.

    target   ``start``: start noises; for those of a trained step see ``step_search.py``
    start    ``mean``: the group shares the refitted mean (the paper); ``elites``: G distinct noises, the best seen;
             ``contrast``: the best and the worst seen, half each
    fresh    with ``elites``: G draws from the refitted distribution in place of the best seen
    project  of the shared mean.  ``sphere``: it is rescaled to norm sqrt(d), which candidates have and their mean
             lacks; ``none``: the paper; ``best``: the single best candidate in its place
    weights  of the elites in the refit.  ``uniform``: the paper; ``rank``: linear in the rank; ``softmax``: of rewards
             over ``temperature`` standard deviations, which with elites = candidates is MPPI (arXiv:1707.02342)
    mix      share of the prompts that keep plain noise
    anneal   what remains of the searched share in the last iteration, linearly; 1 is no annealing
    momentum share of the old mean and std that a refit keeps
    """

    target: Literal["start", "step"] = "start"
    rounds: int = 1
    candidates: int = 32
    elites: int = 16
    estimate_steps: int = 4
    start: Literal["mean", "elites", "contrast"] = "elites"
    project: Literal["sphere", "none", "best"] = "sphere"
    weights: Literal["uniform", "rank", "softmax"] = "uniform"
    temperature: float = 1.0
    fresh: bool = False
    mix: float = 0.0
    anneal: float = 1.0
    momentum: float = 0.0
    std_floor: float = 0.05

    def __post_init__(self) -> None:
        if self.target != "start":
            raise ValueError(
                f"algorithm.noise.target must be start in this search, got {self.target!r}; use "
                "algorithm/noise=elite_step or elite_paper_step to search the noise of a trained step"
            )
        _check_counts(self, "rounds", "candidates", "elites", "estimate_steps")
        if self.elites > self.candidates:
            raise ValueError(
                f"algorithm.noise.elites must be at most algorithm.noise.candidates = {self.candidates}, got "
                f"{self.elites}; lower it or raise candidates"
            )
        _check_choice(self, "start", ("mean", "elites", "contrast"))
        _check_choice(self, "project", ("sphere", "none", "best"))
        _check_choice(self, "weights", ("uniform", "rank", "softmax"))
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"algorithm.noise.temperature must be positive and finite, got {self.temperature}")
        if self.project == "best" and self.start != "mean":
            raise ValueError(
                f"algorithm.noise.project=best gives one noise a group, got start={self.start}; use start=mean"
            )
        if self.fresh and self.start != "elites":
            raise ValueError(f"algorithm.noise.fresh draws distinct noises, got start={self.start}; use start=elites")
        for field in ("mix", "anneal"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(
                    f"algorithm.noise.{field} must lie in [0, 1], got {getattr(self, field)}; it is a share of prompts"
                )
        if not 0 <= self.momentum < 1:
            raise ValueError(
                f"algorithm.noise.momentum must lie in [0, 1), got {self.momentum}; 0 keeps nothing of the old fit"
            )
        if not 0 <= self.std_floor < math.inf:
            raise ValueError(
                f"algorithm.noise.std_floor must be finite and not negative, got {self.std_floor}; 0 is no floor"
            )

    def __call__(self, draw: NoiseDraw, score: Score) -> Noise:
        self.check_group(draw.group_size)
        share = self.searched_share(draw.iteration, draw.num_iterations)
        # plain prompts are not even scored
        searched = [place for place, u in enumerate(draw.uniform(DECISION_STREAM)) if u < share]
        num_prompts = len(draw.prompt_ids)
        start_BCHW = draw.starts(START_STREAM)
        metrics = {"search/share": len(searched) / num_prompts}
        if not searched:
            return Noise(start_BCHW, metrics, num_scored=0)
        rounds, rounds_SK, fitted = self._search(draw, searched, score)
        metrics["search/gain"] = self._gain(rounds_SK).mean().item()
        samples = _Searched(draw, searched, rounds)
        rows_B, prompts_B, places_B = samples.indices
        estimates_PG = None
        if self.fresh:
            refitted = replace(rounds[-1], stream=SEARCH_STREAM + self.rounds, moments=fitted)
            found_BCHW = refitted.at(prompts_B, places_B)
        elif self.start == "mean" and self.project != "best":
            found_BCHW = fitted[0][prompts_B]
        else:
            seen_SK = torch.cat(rounds_SK, dim=1)
            picked_SG = self._pick(best_first(seen_SK), draw.group_size)
            found_BCHW = samples.picked(picked_SG)
            estimates_PG = seen_SK.new_full((num_prompts, draw.group_size), math.nan)
            estimates_PG[rounds[0].prompts_P] = seen_SK.gather(1, picked_SG)
        start_BCHW[rows_B] = found_BCHW
        num_scored = len(searched) * self.rounds * self.candidates
        is_shared = self.start == "mean" and len(searched) == num_prompts
        return Noise(start_BCHW, metrics, num_scored, estimates_PG, is_shared)

    def check_group(self, group_size: int) -> None:
        """ValueError if the candidates are too few to give each sample of a group its own."""
        if not self.fresh and self.start != "mean":
            _check_group(self, group_size)

    def searched_share(self, iteration: int, num_iterations: int) -> float:
        """The expected share of prompts that are searched: from 1 - mix down to anneal * (1 - mix)."""
        progress = min(iteration / max(num_iterations - 1, 1), 1.0)
        return (1.0 - self.mix) * (1.0 + (self.anneal - 1.0) * progress)

    def _search(
        self, draw: NoiseDraw, searched: list[int], score: Score
    ) -> tuple[list[Candidates], list[Tensor], tuple[Tensor, Tensor]]:
        """The candidates of each round, their rewards [S, K], and the moments fitted to the last."""
        mean_SCHW = torch.zeros(len(searched), *draw.latent_shape, device=draw.device)
        std_SCHW = torch.ones_like(mean_SCHW)
        rounds, rounds_SK = [], []
        for r in range(self.rounds):
            candidates = Candidates(draw, SEARCH_STREAM + r, self.candidates, searched, (mean_SCHW, std_SCHW))
            rewards_SK = scores_of(score, candidates, self.estimate_steps)
            rounds.append(candidates)
            rounds_SK.append(rewards_SK)
            elites_ST = best_first(rewards_SK)[:, : self.elites]
            mean_SCHW, std_SCHW = candidates.refit(
                elites_ST,
                elite_weights(rewards_SK.gather(1, elites_ST), self.weights, self.temperature),
                momentum=self.momentum,
                std_floor=self.std_floor,
                # between rounds the mean stays where it is: with the std that was fitted beside it, candidates have the
                # norm of the elites
                project=self.project == "sphere" and self.start == "mean" and r == self.rounds - 1,
            )
        return rounds, rounds_SK, (mean_SCHW, std_SCHW)

    def _gain(self, rounds_SK: list[Tensor]) -> Tensor:
        return rounds_SK[-1].topk(self.elites, dim=1).values.mean(dim=1) - rounds_SK[0].mean(dim=1)

    def _pick(self, order_PK: Tensor, group_size: int) -> Tensor:
        """Which of the candidates seen, ordered best first, are handed out: indices [P, G]."""
        if self.start == "mean":
            return order_PK[:, :1].expand(-1, group_size)
        if self.start == "elites":
            return order_PK[:, :group_size]
        num_worst = group_size // 2
        return torch.cat([order_PK[:, : group_size - num_worst], order_PK[:, order_PK.shape[1] - num_worst :]], dim=1)


@dataclass(frozen=True, kw_only=True)
class BestOfK:
    """The best of K plain noises: one for the group (``shared``), or each sample's best of its own K (``distinct``)."""

    candidates: int = 8
    estimate_steps: int = 4
    start: Literal["shared", "distinct"] = "distinct"

    def __post_init__(self) -> None:
        _check_counts(self, "candidates", "estimate_steps")
        _check_choice(self, "start", ("shared", "distinct"))

    def __call__(self, draw: NoiseDraw, score: Score) -> Noise:
        num_searches = draw.group_size if self.start == "distinct" else 1
        everyone = range(len(draw.prompt_ids))
        candidates = Candidates(draw, SEARCH_STREAM, num_searches * self.candidates, everyone)
        rewards_PK = scores_of(score, candidates, self.estimate_steps)
        best_PS = rewards_PK.unflatten(1, (num_searches, self.candidates)).argmax(dim=2)
        best_PS = best_PS + self.candidates * torch.arange(num_searches, device=best_PS.device)
        return _hand_out([candidates], rewards_PK, best_PS)


@dataclass(frozen=True, kw_only=True)
class RandomSearch:
    """The ablation of Smart-GRPO that must not help: as many candidates are scored, and random ones are taken."""

    rounds: int = 1
    candidates: int = 32
    estimate_steps: int = 4
    start: Literal["shared", "distinct"] = "distinct"

    def __post_init__(self) -> None:
        _check_counts(self, "rounds", "candidates", "estimate_steps")
        _check_choice(self, "start", ("shared", "distinct"))

    def check_group(self, group_size: int) -> None:
        """ValueError if the candidates are too few to give each sample of a group its own."""
        if self.start == "distinct":
            _check_group(self, group_size)

    def __call__(self, draw: NoiseDraw, score: Score) -> Noise:
        self.check_group(draw.group_size)
        everyone = range(len(draw.prompt_ids))
        rounds = [Candidates(draw, SEARCH_STREAM + r, self.candidates, everyone) for r in range(self.rounds)]
        rewards_PK = torch.cat([scores_of(score, candidates, self.estimate_steps) for candidates in rounds], dim=1)
        # candidates are exchangeable, so the first ones are random ones
        num_taken = draw.group_size if self.start == "distinct" else 1
        taken_PS = torch.arange(num_taken, device=rewards_PK.device).expand(len(rewards_PK), -1)
        return _hand_out(rounds, rewards_PK, taken_PS)


def _hand_out(rounds: list[Candidates], rewards_PK: Tensor, picked_PS: Tensor) -> Noise:
    """The candidates picked, one for the group or one a sample."""
    draw = rounds[0].draw
    picked_PG = picked_PS.expand(-1, draw.group_size)
    estimates_PG = rewards_PK.gather(1, picked_PG)
    metrics = {"search/gain": (estimates_PG.mean() - rewards_PK.mean()).item()}
    start_BCHW = _Searched(draw, list(rounds[0].prompts), rounds).picked(picked_PG)
    return Noise(start_BCHW, metrics, rewards_PK.numel(), estimates_PG, is_shared=picked_PS.shape[1] == 1)


@dataclass(frozen=True)
class _Searched:
    """The rank's samples whose prompts were searched, and their noises, drawn again."""

    draw: NoiseDraw
    prompts: list[int]
    rounds: list[Candidates]

    @cached_property
    def indices(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of each: its place among the rank's samples, that of its prompt among ``prompts``, its own in the group."""
        place = {prompt: s for s, prompt in enumerate(self.prompts)}
        found = [
            (b, place[row // self.draw.group_size], row % self.draw.group_size)
            for b, row in enumerate(self.draw.own_rows)
            if row // self.draw.group_size in place
        ]
        table = on_device(torch.tensor(found, dtype=torch.int64).view(-1, 3), self.draw.device)
        return table[:, 0], table[:, 1], table[:, 2]

    def picked(self, picked_SG: Tensor) -> Tensor:
        """Those picked for them, of the candidates of all rounds numbered through."""
        _, prompts_B, places_B = self.indices
        num = self.rounds[0].num
        picked_B = picked_SG[prompts_B, places_B]
        round_B, ids_B = picked_B // num, picked_B % num
        found_BCHW = self.rounds[0].at(prompts_B, ids_B)
        for r, candidates in enumerate(self.rounds[1:], start=1):
            of_round_BCHW = candidates.at(prompts_B, ids_B)
            found_BCHW = torch.where((round_B == r)[:, None, None, None], of_round_BCHW, found_BCHW)
        return found_BCHW


def scores_of(score: Score, candidates: Candidates, estimate_steps: int) -> Tensor:
    """The estimated rewards of candidates, float32 [P, K]; ValueError for others than finite ones of each."""
    rewards_PK = score(candidates, estimate_steps)
    if rewards_PK.shape != (len(candidates.prompts), candidates.num):
        raise ValueError(
            f"score must return {(len(candidates.prompts), candidates.num)} rewards, got {tuple(rewards_PK.shape)}"
        )
    return finite(rewards_PK)


def _check_group(search: EliteSearch | RandomSearch, group_size: int) -> None:
    if search.rounds * search.candidates < group_size:
        raise ValueError(
            f"algorithm.noise.start={search.start} hands out {group_size} distinct noises of only rounds * "
            f"candidates = {search.rounds * search.candidates}; raise algorithm.noise.candidates or lower "
            "train.group_size"
        )


def _check_counts(search: EliteSearch | BestOfK | RandomSearch, *fields: str) -> None:
    for field in fields:
        if getattr(search, field) < 1:
            raise ValueError(
                f"algorithm.noise.{field} must be at least 1, got {getattr(search, field)}; "
                "use algorithm/noise=gaussian for no search"
            )
    if not isinstance(search, BestOfK) and search.rounds > MAX_ROUNDS:
        raise ValueError(f"algorithm.noise.rounds must be at most {MAX_ROUNDS}, got {search.rounds}; 1 to 3 are usual")


def _check_choice(search: object, field: str, choices: tuple[str, ...]) -> None:
    if getattr(search, field) not in choices:
        raise ValueError(f"algorithm.noise.{field} must be one of {', '.join(choices)}, got {getattr(search, field)!r}")
