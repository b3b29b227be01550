"""Advantages: rewards less the mean of their prompt, over the population's spread of all."""

from collections.abc import Sequence
from typing import Any

import numpy as np


class PerPromptStatTracker:
    """``rewards`` [S, T] are of this iteration; the means also of earlier ones until ``clear``."""

    def __init__(self, global_std: bool) -> None:
        assert global_std, "the benchmark asks for one spread"
        self.seen: dict[str, list[Any]] = {}

    def update(self, prompts: Sequence[str], rewards: Any) -> Any:
        rewards = np.asarray(rewards, dtype=np.float64)
        for prompt, row in zip(prompts, rewards, strict=True):
            self.seen.setdefault(prompt, []).append(row)
        means = np.stack([np.mean(self.seen[prompt], axis=0) for prompt in prompts])
        return (rewards - means) / (rewards.std(axis=0) + 1e-4)

    def clear(self) -> None:
        self.seen = {}
