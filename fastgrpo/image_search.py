"""Search at sampling: images of prompts, each the best that a search finds by the rewards within a budget.

A network evaluation is one pass of the transformer for one sample: a velocity with two branches of guidance takes two.
What is found depends on neither batches nor ranks, but for rounding.  Rewards under ``watch`` only judge: they are not
asked here.  Letters: B images, C H W of one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from fastgrpo.algorithm.image_search import planned
from fastgrpo.algorithm.making import Plan, Search
from fastgrpo.algorithm.noise import START_STREAM, NoiseDraw, Starts, plain_starts
from fastgrpo.algorithm.slots import Slots
from fastgrpo.models.adapter import encoded
from fastgrpo.rewards.weighted_sum import Rewards
from fastgrpo.sampler import Sampler, handed_to_nobody
from fastgrpo.search_portion import Cost, Portion, watched_by_nobody
from fastgrpo.types import Samples


@dataclass(frozen=True)
class Searched:
    """B images, float32 [B, 3, height, width] in [0, 1], the total reward of each, and what all of them took."""

    images_BCHW: Tensor
    scores_B: Tensor
    cost: Cost


@dataclass(frozen=True, kw_only=True)
class ImageSearch:
    """(samples, draw) -> their images, each the best that ``search`` finds in ``budget`` network evaluations.

    estimate_grid: the times of an estimate in so many steps, as ``Algorithm.estimate_grid``.
    watch: told of network evaluations as they are made.
    """

    sampler: Sampler
    rewards: Rewards
    search: Search
    budget: int
    estimate_grid: Callable[[int], Sequence[float]]
    watch: Callable[[int], None] = watched_by_nobody

    @property
    def cost_of_velocity(self) -> int:
        """In network evaluations."""
        return _evaluations_per_velocity(self.sampler)

    @cached_property
    def plan(self) -> Plan:
        """For one image; ValueError for a budget that is too small."""
        num_steps = self.sampler.num_steps
        return planned(self.search, budget=self.budget, num_steps=num_steps, cost=self.cost_of_velocity)

    @torch.no_grad()
    def __call__(
        self,
        samples: Samples,
        draw: NoiseDraw,
        stream: int = START_STREAM,
        hand_on: Callable[[Tensor], None] = handed_to_nobody,
    ) -> Searched:
        """Images of samples of one resolution; ``draw`` and ``stream`` are of their plain noise.

        ``hand_on`` is given the images.  ValueError for a search that takes more than its budget; RewardError, naming
        the reward, for one that fails or answers NaN, which can win nothing.
        """
        # refuses what cannot be before anything is computed
        _ = self.plan
        model = self.sampler.model
        making = Portion(
            sampler=self.sampler,
            rewards=self.rewards,
            estimate_grid=self.estimate_grid,
            velocities=self.budget // self.cost_of_velocity,
            cost_of_velocity=self.cost_of_velocity,
            slots=Slots(draw, stream),
            samples=samples,
            watch=self.watch,
        )
        with model.gathered(), model.sampling(lossy=True):
            found = self.search(making)
        cost = sum(making.costs, Cost())
        if cost.evaluations > self.budget * len(samples):
            raise ValueError(
                f"search {type(self.search).__name__} took {cost.evaluations / len(samples):g} network evaluations an "
                f"image of budget={self.budget}; let it keep to its plan"
            )
        hand_on(found.images_SCHW)
        return Searched(found.images_SCHW, found.scores_S, cost)


def plain(sampler: Sampler, starts: Starts = plain_starts) -> Callable[..., Searched]:
    """What makes images without a search, called as an ``ImageSearch`` is; their scores are NaN.

    starts: how their noise is drawn.
    """
    return partial(_plain, sampler, starts)


def _plain(
    sampler: Sampler,
    starts: Starts,
    samples: Samples,
    draw: NoiseDraw,
    stream: int = START_STREAM,
    hand_on: Callable[[Tensor], None] = handed_to_nobody,
) -> Searched:
    conditions = encoded(sampler.model, samples.asked)
    images_BCHW = sampler(samples, conditions, starts(draw, stream, conditions), hand_on)
    evaluations = len(samples) * sampler.num_steps * _evaluations_per_velocity(sampler)
    return Searched(images_BCHW, torch.full((len(samples),), torch.nan), Cost(evaluations))


def _evaluations_per_velocity(sampler: Sampler) -> int:
    return 2 if sampler.model.has_two_branches else 1
