"""PPO's clipped surrogate with a penalty for leaving the reference policy, of steps or of chunks of them.

ratio = exp(log_prob - old_log_prob)            of a chunk: of the means over its steps
loss  = mean over B of max(-A * ratio, -A * clip(ratio, 1 - clip_range, 1 + clip_range)) + kl_coef * kl

arXiv:1707.06347; of steps as in Flow-GRPO (arXiv:2505.05470), of chunks as in Chunk-GRPO (arXiv:2510.21583), whose
ratio is the geometric mean of those of its steps.  The steps of a chunk are under gradient at once: a chunk of n takes
n times the memory of a step in update.  Letter: B samples of one step or chunk.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from fastgrpo.algorithm.objective.steps import Replayed
from fastgrpo_kernels import GRPOStats, grpo_loss


@dataclass(frozen=True)
class ClippedSurrogate:
    """``clip_range`` belongs to the scale of log_prob, a mean over latent elements: 1e-4 for SDEs, 1e-5 for CPS.

    chunk_sizes: of the first chunks, and the last of them of all others.  The paper's sizes follow the dynamics: few
    steps where latents change fast.
    """

    clip_range: float = 1e-4
    kl_coef: float = 0.04
    chunk_sizes: tuple[int, ...] = (1,)

    signal: ClassVar[Literal["steps"]] = "steps"
    needs_distance: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "chunk_sizes", tuple(self.chunk_sizes))
        check_clip_range(self.clip_range, "1e-4 is Flow-GRPO's")
        check_kl_coef(self.kl_coef)
        if not self.chunk_sizes or min(self.chunk_sizes) < 1:
            raise ValueError(
                f"algorithm.objective.chunk_sizes must be positive numbers, got {list(self.chunk_sizes)}; use [1] for "
                "a ratio of each step"
            )

    def chunks(self, num_steps: int) -> Sequence[range]:
        found: list[range] = []
        first = 0
        while first < num_steps:
            size = self.chunk_sizes[min(len(found), len(self.chunk_sizes) - 1)]
            found.append(range(first, min(first + size, num_steps)))
            first += size
        return found

    def __call__(self, replayed: Replayed, advantage_B: Tensor) -> tuple[Tensor, GRPOStats]:
        """The kernel's docstring tells the rest."""
        return grpo_loss(
            replayed.log_prob_B,
            replayed.old_log_prob_B,
            advantage_B,
            replayed.kl_B,
            clip_range=self.clip_range,
            kl_coef=self.kl_coef,
        )


def check_clip_range(clip_range: float, remedy: str) -> None:
    """ValueError for one that clips nothing or everything."""
    if not 0 < clip_range < 1:
        raise ValueError(f"algorithm.objective.clip_range must lie in (0, 1), got {clip_range}; {remedy}")


def check_kl_coef(kl_coef: float) -> None:
    """ValueError unless it is finite and not negative."""
    if not 0 <= kl_coef < math.inf:
        raise ValueError(
            f"algorithm.objective.kl_coef must be finite and not negative, got {kl_coef}; use 0 for no reference policy"
        )
