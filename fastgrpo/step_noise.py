"""The noise of a trajectory's first trained step: the algorithm's step search, given a reward to search by.

A candidate's reward is estimated by a few ODE steps from the latent that it gives to an image.  Each rank scores those
of its own samples; their scores are all that travels.
Letters: P prompts, G samples of a prompt, B samples of this rank, M candidates of each, C H W of a latent.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fastgrpo.algorithm.algorithm import Algorithm
from fastgrpo.algorithm.noise import STEP_STREAM
from fastgrpo.algorithm.step_candidates import StepCandidates, StepDraw
from fastgrpo.algorithm.step_search import StepSearch
from fastgrpo.distributed.spread import Spread
from fastgrpo.distributed.world import World
from fastgrpo.memory.batches import Batch
from fastgrpo.profiling.timing import inner_stage
from fastgrpo.rewards.scores import Scores
from fastgrpo.rewards.weighted_sum import Rewards
from fastgrpo.sampler import Sampler
from fastgrpo.types import ChosenNoise, Conditions, Samples, Scored


@dataclass(frozen=True, kw_only=True)
class StepNoise:
    """(samples, conditions, x, step) -> the noise of that step, from the latents x at its beginning."""

    algorithm: Algorithm
    sampler: Sampler
    rewards: Rewards
    seed: int
    world: World = field(default_factory=World)

    @torch.no_grad()
    def __call__(self, samples: Samples, conditions: Conditions, x_BCHW: Tensor, step: int) -> ChosenNoise | None:
        search, model = self.algorithm.noise, self.sampler.model
        if not isinstance(search, StepSearch):
            return None
        channels, height, width = x_BCHW.shape[1:]
        draw = StepDraw(self.seed, STEP_STREAM + step, samples, (channels, height, width), x_BCHW.device)
        # both are re-entrant: held from the first round to the last
        with inner_stage("search"), model.gathered(), model.sampling(lossy=True):
            rows = self.world.everyones(list(samples.rows), "rows of a search")
            spread = Spread(tuple(map(tuple, rows)))
            scored: list[Scored] = []

            def score(candidates: StepCandidates, estimate_steps: int) -> Tensor:
                estimate = _Estimate(self, samples, conditions, x_BCHW, step, candidates, estimate_steps)
                scores_AM = self.world.gather(estimate, spread, candidates.num, "search")
                num_prompts = len(samples.prompts)
                scored.append(Scored(tuple(range(num_prompts)), scores_AM.view(num_prompts, -1)))
                return scores_AM

            return replace(search.choose(draw, score), scored=tuple(scored))


@dataclass(frozen=True)
class _Estimate:
    """The rewards [B, M] that the candidates of this rank's samples lead to."""

    of: StepNoise
    samples: Samples
    conditions: Conditions
    x_BCHW: Tensor
    step: int
    candidates: StepCandidates
    estimate_steps: int

    def __call__(self) -> Tensor:
        sampler, total = self.of.sampler, len(self.samples)
        # as many samples at a time as a batch has, each with all of its candidates: whole batches, and few latents held
        begun = list(sampler.cut(total, sampler.batch_sizes.sampling, self._begin, self.samples.most))
        collected = [scores.collect().view(-1, self.candidates.num)[: batch.count] for batch, scores in begun]
        return torch.cat(collected)

    def _begin(self, batch: Batch) -> Scores[Tensor]:
        sampler, grid = self.of.sampler, self.of.sampler.grid
        rows = batch.of(torch.arange(len(self.samples))).tolist()
        x_BCHW, conditions = batch.of(self.x_BCHW), batch.conditions(self.conditions)
        coefficients = self.of.algorithm.dynamics(grid, self.step)
        mean_BCHW = coefficients.mean(x_BCHW, sampler.model.velocity(x_BCHW, grid[self.step], conditions))
        z_BMCHW = mean_BCHW[:, None] + coefficients.std * self.candidates.at(rows)
        times = self.of.algorithm.estimate_grid(self.estimate_steps, start=grid[self.step + 1])
        asked = self.samples.asked
        scores = self.of.rewards.begin_search([asked[row] for row in rows for _ in range(self.candidates.num)])
        replace(sampler, grid=times, estimates=True).handed_on(
            z_BMCHW.flatten(0, 1), conditions.repeat(self.candidates.num), range(self.estimate_steps), scores.add, 0
        )
        return scores
