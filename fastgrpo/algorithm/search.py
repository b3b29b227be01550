"""Noise searches: candidates are scored by the reward of an estimate of their image, and the good ones are kept.

Smart-GRPO (arXiv:2510.02654) fits N(mean, std^2), per prompt and latent element, to the best candidates of each round:
the cross-entropy method.  Candidates are functions of their ids and are drawn again where they are needed again.
Letters: P prompts, G samples of a prompt, K candidates, T elites, C, H, W a latent, d = C * H * W.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fastgrpo.algorithm.noise import DECISION_STREAM, SEARCH_STREAM, START_STREAM, NoiseDraw, Score
from fastgrpo.types import Noise
from fastgrpo_kernels import elite_weights


@dataclass(frozen=True, kw_only=True)
class EliteSearch:
    """Smart-GRPO's search, and what its paper leaves open.

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
        _check_counts(self, "rounds", "candidates", "elites", "estimate_steps")
        if self.elites > self.candidates:
            raise ValueError(f"noise.elites must be at most candidates = {self.candidates}, got {self.elites}")
        _check_choice(self, "start", ("mean", "elites", "contrast"))
        _check_choice(self, "project", ("sphere", "none", "best"))
        _check_choice(self, "weights", ("uniform", "rank", "softmax"))
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"noise.temperature must be positive and finite, got {self.temperature}")
        if self.project == "best" and self.start != "mean":
            raise ValueError(f"noise.project=best gives one noise a group, got start={self.start}; use start=mean")
        if self.fresh and self.start != "elites":
            raise ValueError(f"noise.fresh draws distinct noises, got start={self.start}; use start=elites")
        for field in ("mix", "anneal"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(
                    f"noise.{field} must lie in [0, 1], got {getattr(self, field)}; it is a share of prompts"
                )
        if not 0 <= self.momentum < 1:
            raise ValueError(f"noise.momentum must lie in [0, 1), got {self.momentum}; 0 keeps nothing of the old fit")
        if self.std_floor < 0:
            raise ValueError(f"noise.std_floor must not be negative, got {self.std_floor}; 0 is no floor")

    def __call__(self, draw: NoiseDraw, score: Score) -> Noise:
        if not self.fresh and self.start != "mean" and self.rounds * self.candidates < draw.group_size:
            raise ValueError(
                f"noise.start={self.start} hands out {draw.group_size} distinct noises of only rounds * candidates = "
                f"{self.rounds * self.candidates}; raise noise.candidates or lower group_size"
            )
        share = self.searched_share(draw.iteration, draw.num_iterations)
        rows = [row for row, u in enumerate(draw.uniform(DECISION_STREAM)) if u < share]
        start_PGCHW = draw(START_STREAM, draw.group_size)
        metrics = {"search/share": len(rows) / len(start_PGCHW)}
        if not rows:
            return Noise(start_PGCHW.flatten(0, 1), metrics, num_scored=0)
        # plain prompts are not even scored
        searched = replace(draw, prompt_ids=[draw.prompt_ids[row] for row in rows])
        start_PGCHW[rows], found_PG, gain_P = self._search(searched, score)
        estimates_PG = None
        if found_PG is not None:
            estimates_PG = found_PG.new_full(start_PGCHW.shape[:2], math.nan)
            estimates_PG[rows] = found_PG
        metrics["search/gain"] = gain_P.mean().item()
        num_scored = len(rows) * self.rounds * self.candidates
        is_shared = self.start == "mean" and len(rows) == len(start_PGCHW)
        return Noise(start_PGCHW.flatten(0, 1), metrics, num_scored, estimates_PG, is_shared)

    def searched_share(self, iteration: int, num_iterations: int) -> float:
        """The expected share of prompts that are searched: from 1 - mix down to anneal * (1 - mix)."""
        progress = min(iteration / max(num_iterations - 1, 1), 1.0)
        return (1.0 - self.mix) * (1.0 + (self.anneal - 1.0) * progress)

    def _search(self, draw: NoiseDraw, score: Score) -> tuple[Tensor, Tensor | None, Tensor]:
        """Noises to start from, their estimates where they were scored, and the gain of the elites."""
        mean_PCHW = torch.zeros(len(draw.prompt_ids), *draw.latent_shape, device=draw.device)
        std_PCHW = torch.ones_like(mean_PCHW)
        moments, rounds_PK = [], []
        for r in range(self.rounds):
            moments.append((mean_PCHW, std_PCHW))
            ids_K = torch.arange(self.candidates, device=draw.device)
            candidates_PKCHW = draw.candidates(mean_PCHW, std_PCHW, SEARCH_STREAM + r, ids_K)
            rewards_PK = _estimate(score, candidates_PKCHW, self.estimate_steps, draw.prompt_ids)
            rounds_PK.append(rewards_PK)
            elites_PT = _best_first(rewards_PK)[:, : self.elites]
            mean_PCHW, std_PCHW = draw.refit(
                mean_PCHW,
                std_PCHW,
                SEARCH_STREAM + r,
                elites_PT,
                elite_weights(rewards_PK.gather(1, elites_PT), self.weights, self.temperature),
                momentum=self.momentum,
                std_floor=self.std_floor,
                # between rounds the mean stays where it is: with the std that was fitted beside it, candidates have the
                # norm of the elites
                project=self.project == "sphere" and self.start == "mean" and r == self.rounds - 1,
            )
        gain_P = rounds_PK[-1].topk(self.elites, dim=1).values.mean(dim=1) - rounds_PK[0].mean(dim=1)
        if self.fresh:
            ids_G = torch.arange(draw.group_size, device=draw.device)
            return draw.candidates(mean_PCHW, std_PCHW, SEARCH_STREAM + self.rounds, ids_G), None, gain_P
        if self.start == "mean" and self.project != "best":
            return mean_PCHW[:, None].expand(-1, draw.group_size, -1, -1, -1), None, gain_P
        seen_PK = torch.cat(rounds_PK, dim=1)
        picked_PG = self._pick(_best_first(seen_PK), draw.group_size)
        return self._draw_again(draw, moments, picked_PG), seen_PK.gather(1, picked_PG), gain_P

    def _draw_again(self, draw: NoiseDraw, moments: list[tuple[Tensor, Tensor]], picked_PG: Tensor) -> Tensor:
        """The picked of the candidates of all rounds, numbered through."""
        round_PG, ids_PG = picked_PG // self.candidates, picked_PG % self.candidates
        picked_PGCHW = draw.candidates(*moments[0], SEARCH_STREAM, ids_PG)
        for r, (mean_PCHW, std_PCHW) in enumerate(moments[1:], start=1):
            of_round_PGCHW = draw.candidates(mean_PCHW, std_PCHW, SEARCH_STREAM + r, ids_PG)
            picked_PGCHW = torch.where((round_PG == r)[:, :, None, None, None], of_round_PGCHW, picked_PGCHW)
        return picked_PGCHW

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
        candidates_PKCHW = draw(SEARCH_STREAM, num_searches * self.candidates)
        rewards_PK = _estimate(score, candidates_PKCHW, self.estimate_steps, draw.prompt_ids)
        best_PS = rewards_PK.unflatten(1, (num_searches, self.candidates)).argmax(dim=2)
        best_PS = best_PS + self.candidates * torch.arange(num_searches, device=best_PS.device)
        return _hand_out(candidates_PKCHW, rewards_PK, best_PS, draw.group_size)


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

    def __call__(self, draw: NoiseDraw, score: Score) -> Noise:
        if self.start == "distinct" and self.rounds * self.candidates < draw.group_size:
            raise ValueError(
                f"noise.start=distinct hands out {draw.group_size} noises of only rounds * candidates = "
                f"{self.rounds * self.candidates}; raise noise.candidates or lower group_size"
            )
        rounds_PKCHW = [draw(SEARCH_STREAM + r, self.candidates) for r in range(self.rounds)]
        rounds_PK = [_estimate(score, z_PKCHW, self.estimate_steps, draw.prompt_ids) for z_PKCHW in rounds_PKCHW]
        rewards_PK = torch.cat(rounds_PK, dim=1)
        # candidates are exchangeable, so the first ones are random ones
        num_taken = draw.group_size if self.start == "distinct" else 1
        taken_PS = torch.arange(num_taken, device=rewards_PK.device).expand(len(rewards_PK), -1)
        return _hand_out(torch.cat(rounds_PKCHW, dim=1), rewards_PK, taken_PS, draw.group_size)


def _hand_out(candidates_PKCHW: Tensor, rewards_PK: Tensor, picked_PS: Tensor, group_size: int) -> Noise:
    """The candidates picked, one for the group or one a sample."""
    picked_PG = picked_PS.expand(-1, group_size)
    estimates_PG = rewards_PK.gather(1, picked_PG)
    metrics = {"search/gain": (estimates_PG.mean() - rewards_PK.mean()).item()}
    start_BCHW = _take(candidates_PKCHW, picked_PG).flatten(0, 1)
    return Noise(start_BCHW, metrics, rewards_PK.numel(), estimates_PG, is_shared=picked_PS.shape[1] == 1)


def _estimate(score: Score, candidates_PKCHW: Tensor, estimate_steps: int, prompt_ids: list[int]) -> Tensor:
    rewards_PK = score(candidates_PKCHW, estimate_steps, prompt_ids).float()
    if rewards_PK.shape != candidates_PKCHW.shape[:2]:
        raise ValueError(
            f"score must return {tuple(candidates_PKCHW.shape[:2])} rewards, got {tuple(rewards_PK.shape)}"
        )
    # sorting puts NaN first: a failed reward would be taken for the best
    if not torch.isfinite(rewards_PK).all():
        raise ValueError("a noise search was given rewards that are not finite; check the reward of noisy images")
    return rewards_PK


def _best_first(rewards_PK: Tensor) -> Tensor:
    # stable, so that equal rewards keep the order of the candidates on every device
    return rewards_PK.sort(dim=1, descending=True, stable=True).indices


def _take(candidates_PKCHW: Tensor, indices_PG: Tensor) -> Tensor:
    return candidates_PKCHW[torch.arange(len(indices_PG), device=indices_PG.device)[:, None], indices_PG]


def _check_counts(search: object, *fields: str) -> None:
    for field in fields:
        if getattr(search, field) < 1:
            raise ValueError(
                f"noise.{field} must be at least 1, got {getattr(search, field)}; "
                "use algorithm/noise=gaussian for no search"
            )


def _check_choice(search: object, field: str, choices: tuple[str, ...]) -> None:
    if getattr(search, field) not in choices:
        raise ValueError(f"noise.{field} must be one of {', '.join(choices)}, got {getattr(search, field)!r}")
