"""Advantage: how much better a sample is than its group.  Letters: P prompts, G samples of a prompt, B = P * G.

advantage = clip((reward - mean of the group) / (std + eps), -clamp, clamp)
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastgrpo_kernels import group_advantage


@dataclass(frozen=True)
class GroupAdvantage:
    """``std`` is the population's: of each ``group``, of the whole iteration (``global``), or ``none``: no division."""

    std: Literal["group", "global", "none"] = "global"
    eps: float = 1e-4
    clamp: float = 5.0

    def __post_init__(self) -> None:
        if self.std not in ("group", "global", "none"):
            raise ValueError(f"algorithm.advantage.std must be group, global or none, got {self.std!r}")
        if not 0 < self.eps < math.inf:
            raise ValueError(
                f"algorithm.advantage.eps must be positive and finite, got {self.eps}; 1e-4 is Flow-GRPO's"
            )
        if not self.clamp > 0:
            raise ValueError(f"algorithm.advantage.clamp must be positive, got {self.clamp}; use .inf for no limit")

    def __call__(self, rewards_PG: Tensor) -> Tensor:
        """Advantages [P, G] in float32.  ``rewards_PG`` are those of the whole iteration, on all GPUs."""
        num_prompts, group_size = rewards_PG.shape
        groups_B = torch.arange(num_prompts, device=rewards_PG.device).repeat_interleave(group_size)
        advantage_B = group_advantage(rewards_PG.flatten(), groups_B, std=self.std, eps=self.eps, clamp=self.clamp)
        return advantage_B.view(num_prompts, group_size)
