"""What a start noise promises: a few ODE steps from it to an image, and the reward of that image.

This is the ``score`` that a noise search is given.  Letters: P prompts, K candidates, C H W of a latent.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from fastgrpo.algorithm.algorithm import Algorithm
from fastgrpo.algorithm.dynamics import ODE
from fastgrpo.rewards.reward import Rewards
from fastgrpo.rollout import Rollout
from fastgrpo.types import Conditions, Prompts


@dataclass(frozen=True, kw_only=True)
class EstimatedReward:
    """(noise_PKCHW, estimate_steps) -> rewards_PK, for the prompts of one iteration."""

    rollout: Rollout
    algorithm: Algorithm
    rewards: Rewards
    prompts: Prompts
    conditions: Conditions

    def __call__(self, noise_PKCHW: Tensor, estimate_steps: int) -> Tensor:
        num_candidates = noise_PKCHW.shape[1]
        sample = replace(self.rollout, grid=self.algorithm.estimate_grid(estimate_steps), dynamics=ODE())
        images_BCHW = sample(self.prompts, self.conditions, noise_PKCHW.flatten(0, 1), ()).images_BCHW
        texts = [text for text in self.prompts.texts for _ in range(num_candidates)]
        return self.rewards.score(images_BCHW, texts).view(len(self.prompts), num_candidates)
