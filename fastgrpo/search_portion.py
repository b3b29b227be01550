"""Images in the making, whose candidates are one pool: in batches, with conditions that are encoded once a text.

Letters: S images, each with a search of its own, K candidates of each, n of these at a time, B = S * n rows, b of them
in a batch, C H W of a latent.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from fastgrpo.algorithm.dynamics import ODE
from fastgrpo.algorithm.making import Found
from fastgrpo.algorithm.ranking import best_first
from fastgrpo.algorithm.slots import Slots
from fastgrpo.memory.batches import Batch, in_batches
from fastgrpo.models.adapter import encoded, estimate_decoding
from fastgrpo.rewards.reward import RewardError
from fastgrpo.rewards.scores import Scores
from fastgrpo.rewards.weighted_sum import Rewards
from fastgrpo.sampler import Sampler
from fastgrpo.types import Conditions, Samples

# conditions and images of so many are in memory, latents of all candidates
_BATCHES_AT_ONCE = 4


def watched_by_nobody(num_evaluations: int) -> None:
    """Where nobody looks at how far a search is."""


@dataclass(frozen=True)
class Cost:
    """Network evaluations, and images that were decoded and scored."""

    evaluations: int = 0
    scored: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.evaluations + other.evaluations, self.scored + other.scored)


@dataclass(frozen=True, kw_only=True)
class Portion:
    """``Making`` of samples of one resolution; ``costs`` grow as it is asked."""

    sampler: Sampler
    rewards: Rewards
    estimate_grid: Callable[[int], Sequence[float]]
    velocities: int
    cost_of_velocity: int
    slots: Slots
    samples: Samples
    watch: Callable[[int], None] = watched_by_nobody
    costs: list[Cost] = field(default_factory=list)

    @property
    def num_steps(self) -> int:
        return self.sampler.num_steps

    @cached_property
    def conditions(self) -> Conditions:
        return encoded(self.sampler.model, self.samples.asked)

    def estimates(self, noise_SKCHW: Tensor, num_steps: int) -> Tensor:
        sampler = replace(self.sampler, grid=self.estimate_grid(num_steps), estimates=True)
        return torch.cat([part.scored(sampler, num_steps) for part in self._parts(noise_SKCHW)], dim=1)

    def run(self, x_SKCHW: Tensor, steps: range) -> Tensor:
        return torch.cat([part.run(steps) for part in self._parts(x_SKCHW)], dim=1) if steps else x_SKCHW

    def look(self, x_SKCHW: Tensor, step: int) -> tuple[Tensor, Tensor]:
        x_next, scores = zip(*[part.look(step) for part in self._parts(x_SKCHW)], strict=True)
        return torch.cat(x_next, dim=1), torch.cat(scores, dim=1)

    def best(self, x_SKCHW: Tensor, steps: range) -> Found:
        found: Found | None = None
        for part in self._parts(x_SKCHW):
            images_SKCHW, scores_SK = part.finished(self.sampler, steps)
            best_S1 = best_first(scores_SK)[:, :1]
            rows_S = torch.arange(len(best_S1), device=best_S1.device)
            images_SCHW, scores_S = images_SKCHW[rows_S, best_S1[:, 0]], scores_SK.gather(1, best_S1)[:, 0]
            if found is not None:
                is_better_S = scores_S > found.scores_S
                images_SCHW = torch.where(is_better_S[:, None, None, None], images_SCHW, found.images_SCHW)
                scores_S = torch.where(is_better_S, scores_S, found.scores_S)
            found = Found(images_SCHW, scores_S)
        assert found is not None
        return found

    def _parts(self, x_SKCHW: Tensor) -> "Iterator[_Part]":
        """Some candidates of every image at a time."""
        most = max(len(self.samples), self.samples.most)
        num = max(1, _BATCHES_AT_ONCE * self.sampler.batch_sizes.sampling.value // most)
        for first in range(0, x_SKCHW.shape[1], num):
            yield _Part(portion=self, x_SKCHW=x_SKCHW[:, first : first + num])


@dataclass(frozen=True, kw_only=True)
class _Part:
    """n candidates of each image of a portion, in batches."""

    portion: Portion
    x_SKCHW: Tensor

    def finished(self, sampler: Sampler, steps: range) -> tuple[Tensor, Tensor]:
        """The images that the last steps of the sampler's grid lead to, and their rewards."""
        scores = self._scores()
        _, images_BCHW = sampler.finished(self._x_BCHW, self._conditions, steps, scores.add, self._most)
        self._count(len(steps), is_scored=True)
        return images_BCHW.unflatten(0, self.x_SKCHW.shape[:2]), self._collected(scores)

    def scored(self, sampler: Sampler, num_steps: int) -> Tensor:
        """Rewards of the images that all steps of the sampler's grid lead to."""
        scores, steps = self._scores(), range(num_steps)
        sampler.handed_on(self._x_BCHW, self._conditions, steps, scores.add, self._most)
        self._count(num_steps, is_scored=True)
        return self._collected(scores)

    def run(self, steps: range) -> Tensor:
        sampler = self.portion.sampler
        x_BCHW = sampler.latents(self._x_BCHW, self._conditions, steps, self._most)
        self._count(len(steps))
        return x_BCHW.unflatten(0, self.x_SKCHW.shape[:2])

    def look(self, step: int) -> tuple[Tensor, Tensor]:
        sampler, scores = self.portion.sampler, self._scores()
        x_BCHW, conditions, t = self._x_BCHW, self._conditions, sampler.grid[step]
        decode = estimate_decoding(sampler.model)

        def run(batch: Batch) -> tuple[Tensor, Tensor]:
            x_bCHW = batch.of(x_BCHW)
            v_bCHW = sampler.model.velocity(x_bCHW, t, batch.conditions(conditions))
            x_0_bCHW = ODE()((t, 0.0), 0).mean(x_bCHW, v_bCHW)
            decoded = in_batches(len(x_0_bCHW), sampler.batch_sizes.decoding, lambda part: decode(part.of(x_0_bCHW)))
            images_bCHW = torch.cat([images[: part.count] for part, images in decoded])
            return ODE()(sampler.grid, step).mean(x_bCHW, v_bCHW)[: batch.count], images_bCHW[: batch.count]

        x_next = []
        for _, (x_next_bCHW, images_bCHW) in sampler.cut(len(x_BCHW), sampler.batch_sizes.sampling, run, self._most):
            scores.add(images_bCHW)
            x_next.append(x_next_bCHW)
        self._count(1, is_scored=True)
        return torch.cat(x_next).unflatten(0, self.x_SKCHW.shape[:2]), self._collected(scores)

    @cached_property
    def _x_BCHW(self) -> Tensor:
        return self.x_SKCHW.flatten(0, 1)

    @property
    def _conditions(self) -> Conditions:
        return self.portion.conditions.repeat(self.x_SKCHW.shape[1])

    @property
    def _most(self) -> int:
        """Rows of the rank that has most."""
        return self.portion.samples.most * self.x_SKCHW.shape[1]

    def _scores(self) -> Scores[Tensor]:
        asked = [prompt for prompt in self.portion.samples.asked for _ in range(self.x_SKCHW.shape[1])]
        return self.portion.rewards.begin_search(asked)

    def _collected(self, scores: Scores[Tensor]) -> Tensor:
        scores_B = scores.collect()
        # each reward is finite by now
        if not torch.isfinite(scores_B).all():
            raise RewardError(
                "the weighted sum of the rewards is not finite, and nothing can be found by it; lower reward.weights"
            )
        return scores_B.unflatten(0, self.x_SKCHW.shape[:2])

    def _count(self, num_steps: int, *, is_scored: bool = False) -> None:
        num_rows = len(self._x_BCHW)
        evaluations = num_rows * num_steps * self.portion.cost_of_velocity
        self.portion.costs.append(Cost(evaluations, num_rows if is_scored else 0))
        self.portion.watch(evaluations)
