"""Where a run's rewards come from: loaded by this process and tried on golden pairs, or asked of a scoring rank."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from fastgrpo.loading import one_at_a_time
from fastgrpo.rewards.ranks import PolicyRank
from fastgrpo.rewards.self_test import GoldenScores, self_test
from fastgrpo.rewards.weighted_sum import Rewards
from fastgrpo.types import Prompt

Loaded = tuple[Rewards, dict[str, GoldenScores]]


@dataclass(frozen=True, kw_only=True)
class RewardSource:
    """What rewards are made of, before any weight of theirs is loaded.

    make: the rewards of a config.  make_around: the same around ``terms`` and ``watch`` that are given to it.
    names: those of both, by the key that they stand under.
    """

    make: Callable[[], Rewards]
    make_around: Callable[..., Rewards]
    names: Mapping[str, Sequence[str]]

    def load(self, prompts: Sequence[Prompt | str], device: torch.device | str) -> Loaded:
        """The rewards, which can judge ``prompts``, and their golden scores unless ``reward.golden`` is false."""
        with one_at_a_time:
            rewards = self.make()
        rewards.check_prompts(prompts)
        if rewards.golden:
            return rewards, self_test(rewards, device, prompts)
        # without golden pairs nothing has asked the other machines yet
        rewards.greet()
        return rewards, {}

    def ask(self, part: PolicyRank) -> Loaded:
        """The rewards as this rank's scoring rank computes them, and the golden scores that it found."""
        # waits until the scoring rank has loaded them
        golden_scores = part.golden_scores()
        asked = {key: part.rewards(names) for key, names in self.names.items()}
        return self.make_around(**asked), golden_scores
