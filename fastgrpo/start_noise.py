"""Where the trajectories begin: the algorithm's noise proposal, given a reward to search by.

The reward of a start noise is estimated by a few ODE steps from it to an image.  The candidates of all prompts are one
pool that is spread over the ranks; their scores are all that travels.
Letters: P prompts, K candidates, B samples of this rank, C H W of a latent.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fastgrpo.algorithm.algorithm import Algorithm
from fastgrpo.algorithm.noise import Candidates, NoiseDraw, NoiseProposal
from fastgrpo.algorithm.retries import Retries
from fastgrpo.distributed.spread import Spread
from fastgrpo.distributed.world import World
from fastgrpo.models.adapter import encoded
from fastgrpo.proposal.learner import Learner, NothingLearned
from fastgrpo.rewards.weighted_sum import Rewards
from fastgrpo.sampler import Sampler
from fastgrpo.types import Noise, Prompts, Samples, Scored


@dataclass(frozen=True, kw_only=True)
class StartNoise:
    """(samples, iteration) -> their start noises."""

    algorithm: Algorithm
    sampler: Sampler
    rewards: Rewards
    seed: int
    num_iterations: int = 1
    world: World = field(default_factory=World)
    proposal: Learner = field(default_factory=NothingLearned)

    def __call__(self, samples: Samples, iteration: int = 0) -> Noise:
        """Those that the samples begin with."""
        return self._proposed(samples, iteration, self.algorithm.noise)

    def again(self, samples: Samples, iteration: int, groups: Sequence[int], attempt: int) -> Noise:
        """Those of samples of some groups, of which all samples are made again."""
        retries = self.algorithm.noise
        assert isinstance(retries, Retries)
        return self._proposed(samples, iteration, lambda draw, score: retries.again(draw, score, groups, attempt))

    @torch.no_grad()
    def _proposed(self, samples: Samples, iteration: int, propose: NoiseProposal) -> Noise:
        prompts, model = samples.prompts, self.sampler.model

        def moments(places: Sequence[int], latent_shape: Sequence[int]) -> tuple[Tensor, Tensor]:
            texts = prompts.texts
            return self.proposal.moments(model.encode([texts[place] for place in places]), latent_shape)

        draw = NoiseDraw(
            seed=self.seed,
            prompt_ids=prompts.ids,
            group_size=samples.group_size,
            latent_shape=model.latent_shape_of(prompts.resolution),
            device=model.device,
            iteration=iteration,
            num_iterations=self.num_iterations,
            rows=samples.rows,
            moments=moments,
        )

        scored: list[Scored] = []
        with ExitStack() as rounds:

            def score(candidates: Candidates, estimate_steps: int) -> Tensor:
                # both are re-entrant: held from the first round to the last, and not where nothing is searched
                rounds.enter_context(model.gathered())
                rounds.enter_context(model.sampling(lossy=True))
                asked = [prompts.asked[place] for place in candidates.prompts]
                searched = Prompts(asked, candidates.prompt_ids, prompts.resolution)
                scores_PK = self._scores(searched, candidates, estimate_steps)
                scored.append(Scored(tuple(candidates.prompts), scores_PK))
                return scores_PK

            return replace(propose(draw, score), scored=tuple(scored))

    def _scores(self, prompts: Prompts, candidates: Candidates, estimate_steps: int) -> Tensor:
        """Rewards [P, K] of all candidates, on every rank."""
        spread = Spread.evenly(len(prompts) * candidates.num, self.world.size)
        own = spread.rows[self.world.rank]
        # a rank without candidates keeps step with the others on one that is thrown away
        samples = Samples(prompts, candidates.num, own or (0,), spread.most)
        estimate = replace(self.sampler, grid=self.algorithm.estimate_grid(estimate_steps), estimates=True)

        def rewards() -> Tensor:
            scores = self.rewards.begin_search(samples.asked)
            conditions = encoded(self.sampler.model, samples.asked)
            noise_BCHW = candidates.rows(samples.rows)
            estimate.handed_on(noise_BCHW, conditions, range(estimate_steps), scores.add, samples.most)
            return scores.collect()[: len(own), None]

        return self.world.gather(rewards, spread, 1, "search").view(len(prompts), candidates.num)
