"""Groups that are made again, where the algorithm's noise asks for it: rollout and rewards from new noises.

What a sample keeps of its images is trained on, with advantages of the rewards that are kept.
Letters: P prompts, S of them that are made again, G samples of a prompt, B samples of this rank, b of them that are
made again, R rewards.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgrpo.algorithm.retries import Retries
from fastgrpo.distributed.spread import Spread
from fastgrpo.distributed.world import World
from fastgrpo.models.adapter import encoded
from fastgrpo.on_device import on_device
from fastgrpo.rewards.weighted_sum import Rewards
from fastgrpo.rollout import Rollout
from fastgrpo.start_noise import StartNoise
from fastgrpo.types import Samples, Scored, Trajectories

# sizes that a batch has where fewer samples are made again than it takes: each is compiled for on its own
_NUM_SIZES = 4


class Made(NamedTuple):
    """Trajectories of this rank's samples, the rewards [P * G, R] of all ranks', and what the search measured.

    scored: the total rewards of each attempt, the first one's too where there was another.
    """

    trajectories: Trajectories[Any]
    rewards_BR: Tensor
    metrics: dict[str, float] = {}  # noqa: RUF012
    scored: tuple[Scored, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Retry:
    """What was made of an iteration's samples -> what they keep of that and of further attempts, in its place."""

    start_noise: StartNoise
    rollout: Rollout
    rewards: Rewards
    world: World = field(default_factory=World)

    def __call__(self, samples: Samples, spread: Spread, iteration: int, made: Made) -> Made:
        retries = self.start_noise.algorithm.noise
        if not isinstance(retries, Retries):
            return made
        first_PG = total_PG = self._total(made.rewards_BR, samples.group_size)
        tried: list[int] = []
        for attempt in range(1, retries.tries + 1):
            groups = retries.groups(total_PG)
            if not groups:
                break
            tried.append(len(groups))
            made = self._again(retries, samples, spread, iteration, made, groups, attempt)
            total_PG = self._total(made.rewards_BR, samples.group_size)
        # of groups that were made in one attempt there is nothing to compare
        again = made.scored[0].places if tried else ()
        firsts = (Scored(again, first_PG[on_device(again, first_PG.device)], is_of_images=True),) if tried else ()
        metrics = {
            "search/share": max(tried, default=0) / len(samples.prompts),
            # the host waits for it only where something was made again
            "search/gain": (total_PG.mean() - first_PG.mean()).item() if tried else 0.0,
            "search/images": sum(tried) / len(samples.prompts),
        }
        return Made(made.trajectories, made.rewards_BR, metrics, (*firsts, *made.scored))

    def _again(
        self,
        retries: Retries,
        samples: Samples,
        spread: Spread,
        iteration: int,
        made: Made,
        groups: list[int],
        attempt: int,
    ) -> Made:
        """One attempt at the samples of some groups, each on the rank that has it."""
        group_size, num_rewards = samples.group_size, made.rewards_BR.shape[1]
        rows_SG = [place * group_size + sample for place in groups for sample in range(group_size)]
        number = {row: n for n, row in enumerate(rows_SG)}
        found = Spread(tuple(tuple(number[row] for row in rows if row in number) for rows in spread.rows))
        own = [row for row in samples.rows if row in number]
        # a rank that has none keeps step with the others on one that is thrown away
        rows = tuple(retries.row(row, group_size, attempt) for row in own or rows_SG[:1])
        again = Samples(samples.prompts, group_size * (retries.tries + 1), rows, self._filled(found.most, spread.most))
        noise = self.start_noise.again(again, iteration, groups, attempt)
        scores = self.rewards.begin(again.asked)
        conditions = encoded(self.start_noise.sampler.model, again.asked)
        trajectories = self.rollout(again, conditions, noise, iteration, scores.add)
        new_bR = self.world.gather(lambda: scores.collect()[: len(own)], found, num_rewards, "rewards of another try")

        device = made.rewards_BR.device
        rows_b = on_device(rows_SG, device)
        old_bR = made.rewards_BR[rows_b]
        new_SG = self._total(new_bR, group_size)
        scored = (*made.scored, Scored(tuple(groups), new_SG, is_of_images=True))
        is_new_b = retries.prefers(new_SG, self._total(old_bR, group_size)).flatten()
        rewards_BR = made.rewards_BR.index_copy(0, rows_b, torch.where(is_new_b[:, None], new_bR, old_bR))
        if not own:
            return Made(made.trajectories, rewards_BR, scored=scored)
        places_b = on_device([b for b, row in enumerate(samples.rows) if row in number], device)
        is_taken_b = is_new_b[on_device([number[row] for row in own], device)]
        _replace(made.trajectories, places_b, trajectories, is_taken_b)
        return Made(made.trajectories, rewards_BR, scored=scored)

    def _filled(self, num_rows: int, most: int) -> int:
        """How many rows a rank makes for so many: trained steps in update's batches, images in batches of a few sizes.

        most: rows of the rank that has most in the first attempt.
        """
        sampler = self.start_noise.sampler
        if not self.start_noise.algorithm.learns_from_images:
            return max(num_rows, min(most, sampler.batch_sizes.training.value))
        unit = -(-min(most, sampler.batch_sizes.sampling.value) // _NUM_SIZES)
        return min(most, -(-num_rows // unit) * unit)

    def _total(self, rewards_BR: Tensor, group_size: int) -> Tensor:
        return self.rewards.of_groups(rewards_BR, group_size).total_PG


def _replace(made: Trajectories[Any], rows_b: Tensor, new: Trajectories[Any], is_taken_b: Tensor) -> None:
    """Put those of ``new`` that are taken in the place of some rows, without a second copy of all that was made."""
    assert not made.gradients
    for (of_all, dim), (of_some, _) in zip(made.by_sample, new.by_sample, strict=True):
        shape = [1] * of_all.ndim
        shape[dim] = len(rows_b)
        of_all.index_copy_(dim, rows_b, torch.where(is_taken_b.view(shape), of_some, of_all.index_select(dim, rows_b)))
