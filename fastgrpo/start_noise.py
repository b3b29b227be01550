"""Where the trajectories begin: the algorithm's noise proposal, given a reward to search by.

The reward of a start noise is estimated by a few ODE steps from it to an image.
Letters: P prompts, K candidates, C H W of a latent.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastgrpo.algorithm.algorithm import Algorithm
from fastgrpo.algorithm.dynamics import ODE
from fastgrpo.algorithm.noise import NoiseDraw
from fastgrpo.rewards.weighted_sum import Rewards
from fastgrpo.rollout import Rollout
from fastgrpo.types import Conditions, Noise, Prompts


@dataclass(frozen=True, kw_only=True)
class StartNoise:
    """(prompts, conditions, iteration) -> ``group_size`` start noises a prompt."""

    algorithm: Algorithm
    rollout: Rollout
    rewards: Rewards
    group_size: int
    seed: int
    num_iterations: int = 1

    @torch.no_grad()
    def __call__(self, prompts: Prompts, conditions: Conditions, iteration: int = 0) -> Noise:
        draw = NoiseDraw(
            seed=self.seed,
            prompt_ids=prompts.ids,
            group_size=self.group_size,
            latent_shape=self.rollout.model.latent_shape,
            device=self.rollout.model.device,
            iteration=iteration,
            num_iterations=self.num_iterations,
        )

        def score(noise_PKCHW: Tensor, estimate_steps: int, prompt_ids: list[int]) -> Tensor:
            rows = [prompts.ids.index(i) for i in prompt_ids]
            scored = Prompts([prompts.texts[row] for row in rows], prompt_ids)
            scores = self.rewards.begin_search([text for text in scored.texts for _ in range(noise_PKCHW.shape[1])])
            sample = replace(self.rollout, grid=self.algorithm.estimate_grid(estimate_steps), dynamics=ODE())
            sample(scored, conditions.take(rows), noise_PKCHW.flatten(0, 1), (), scores.add)
            return scores.collect().view(noise_PKCHW.shape[:2])

        # once for all rounds
        with self.rollout.model.sampling(lossy=True):
            return self.algorithm.noise(draw, score)
