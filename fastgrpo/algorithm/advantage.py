"""Advantage: how much better a sample is than its group.  Letters: P prompts, G samples of a prompt.

advantage = clip((reward - mean of the group) / (std + eps), -clamp, clamp)
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class GroupAdvantage:
    """``std`` is the population's: of each ``group``, of the whole iteration (``global``), or ``none``: no division."""

    std: Literal["group", "global", "none"] = "global"
    eps: float = 1e-4
    clamp: float = 5.0

    def __post_init__(self) -> None:
        if self.std not in ("group", "global", "none"):
            raise ValueError(f"advantage.std must be group, global or none, got {self.std!r}")
        if self.eps <= 0:
            raise ValueError(f"advantage.eps must be positive, got {self.eps}; 1e-4 is Flow-GRPO's")
        if self.clamp <= 0:
            raise ValueError(f"advantage.clamp must be positive, got {self.clamp}; use .inf for no limit")

    def __call__(self, rewards_PG: Tensor) -> Tensor:
        """Advantages [P, G] in float32.  ``rewards_PG`` are those of the whole iteration, on all GPUs."""
        rewards_PG = rewards_PG.float()
        advantage_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
        if self.std == "group":
            advantage_PG = advantage_PG / (rewards_PG.std(dim=1, keepdim=True, correction=0) + self.eps)
        elif self.std == "global":
            advantage_PG = advantage_PG / (rewards_PG.std(correction=0) + self.eps)
        # the mean of equal rewards is rounded, and eps would make an advantage of the rounding error
        is_flat_P1 = rewards_PG.amax(dim=1, keepdim=True) == rewards_PG.amin(dim=1, keepdim=True)
        return torch.where(is_flat_P1, 0.0, advantage_PG).clamp(-self.clamp, self.clamp)
