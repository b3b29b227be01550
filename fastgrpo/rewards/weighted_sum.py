"""The rewards of an iteration, and their weighted sum.

    total   = sum over terms of weight * reward
    learned = total, or with ``normalize``  sum over terms of weight * (reward - mean of the group) / (std + 1e-4)

Terms are trained on; watched rewards are computed and logged, and train nothing: they show when the terms are hacked.
``normalize`` is GDPO's sum (arXiv:2601.05242): a reward counts by its weight, whatever its scale, and combinations that
add up to the same total stay apart; the advantage's ``std: global`` is then its normalization over the batch.
Letters: P prompts, G samples of a prompt, B = P * G images, prompt-major.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastgrpo import types
from fastgrpo.own_code.raised_at import raised_at
from fastgrpo.rewards.reward import Reward, check_prompt_of
from fastgrpo.rewards.scores import Scores
from fastgrpo.rewards.scoring import Scoring
from fastgrpo.types import Prompt, as_prompts
from fastgrpo_kernels import group_advantage

_EPS = 1e-4


@dataclass(frozen=True, kw_only=True)
class Rewards:
    """The weighted sum of ``terms``; ``watch`` is logged beside it.

    With ``golden`` every reward is tried on golden pairs before a run: see ``fastgrpo.rewards.self_test``.
    """

    terms: dict[str, Reward]
    weights: dict[str, float]
    watch: dict[str, Reward] = field(default_factory=dict)
    normalize: bool = False
    golden: bool = True
    scoring: Scoring = field(default_factory=Scoring)

    def __post_init__(self) -> None:
        if not self.terms:
            raise ValueError(
                "there is no reward to train on; give reward.terms at least one, for example reward=shapes"
            )
        if self.terms.keys() != self.weights.keys():
            raise ValueError(
                f"reward.terms are {sorted(self.terms)} but reward.weights are for {sorted(self.weights)}; "
                "give every term one weight, and use reward.watch for a reward that is only logged"
            )
        if both := self.terms.keys() & self.watch.keys():
            raise ValueError(
                f"{sorted(both)} are in reward.terms and in reward.watch; name the watched ones differently"
            )
        for name, weight in self.weights.items():
            if not math.isfinite(weight):
                raise ValueError(f"reward.weights.{name} must be a finite number, got {weight}")
        if not any(self.weights.values()):
            raise ValueError(
                f"reward.weights are 0 for {', '.join(self.weights)}, so nothing would be learned; give one of them a "
                "weight, and use reward.watch for a reward that is only logged"
            )
        for name, reward in self.all.items():
            if not callable(reward):
                raise ValueError(
                    f"reward {name!r} is {reward!r}, which cannot be called; see reward=custom for your own"
                )

    @property
    def all(self) -> dict[str, Reward]:
        """Terms and watched rewards by name."""
        return self.terms | self.watch

    def check_prompts(self, prompts: Iterable[Prompt | str]) -> None:
        """ValueError, naming reward and prompt, for the first prompt that a reward cannot judge."""
        for prompt in as_prompts(prompts):
            for name, reward in self.all.items():
                try:
                    check_prompt_of(reward, prompt)
                except ValueError as error:
                    raise ValueError(f"reward {name!r} cannot judge the prompt {prompt.text!r}: {error}") from error
                except Exception as error:
                    where = f", at {line}; correct it there" if (line := raised_at(error)) else ""
                    raise ValueError(
                        f"check_prompt of reward {name!r} raised {type(error).__name__} for {prompt.text!r}: "
                        f"{error}{where}"
                    ) from error

    def greet(self) -> None:
        """RewardError, naming the reward, unless somebody is there to answer for each that asks other machines."""
        for reward in self.all.values():
            if (greet := getattr(reward, "greet", None)) is not None:
                greet()

    def begin(self, prompts: Sequence[Prompt | str]) -> Scores[Tensor]:
        """Every reward of images to come, one prompt an image: [B, R], a column for each of ``all``."""
        return Scores(self.scoring, self.all, prompts, lambda named_B: torch.stack(list(named_B.values()), dim=1))

    def of_groups(self, rewards_BR: Tensor, group_size: int) -> types.Rewards:
        """What advantages are made of: the columns that ``begin`` collects, of all B = P * G images."""
        named_PG = {
            name: reward_B.view(-1, group_size) for name, reward_B in zip(self.all, rewards_BR.unbind(1), strict=True)
        }
        total_PG = self._total(named_PG)
        learned_PG = total_PG
        if self.normalize:
            learned_PG = self._total({name: _normalized(named_PG[name]) for name in self.terms})
        return types.Rewards(named=named_PG, total_PG=total_PG, learned_PG=learned_PG)

    def begin_search(self, prompts: Sequence[Prompt | str]) -> Scores[Tensor]:
        """The total [B] alone, one prompt an image: what a noise search asks for.

        It is the plain sum also with ``normalize``, as a search compares images of several rounds.
        """
        return Scores(self.scoring, self.terms, prompts, self._total)

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt | str]) -> types.Rewards:
        """Every reward of the images of P prompts, B a multiple of P, each prompt's images in a row."""
        if not prompts or len(images_BCHW) % len(prompts):
            raise ValueError(
                f"{len(images_BCHW)} images are not a whole number of images for each of {len(prompts)} prompts"
            )
        group_size = len(images_BCHW) // len(prompts)
        scores = self.begin([prompt for prompt in prompts for _ in range(group_size)])
        scores.add(images_BCHW)
        return self.of_groups(scores.collect(), group_size)

    def score(self, images_BCHW: Tensor, prompts: Sequence[Prompt | str]) -> Tensor:
        """The total [B] alone, one prompt an image."""
        scores = self.begin_search(prompts)
        scores.add(images_BCHW)
        return scores.collect()

    def _total(self, named: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([self.weights[name] * named[name] for name in self.terms]).sum(dim=0)


def _normalized(reward_PG: Tensor) -> Tensor:
    num_prompts, group_size = reward_PG.shape
    groups_B = torch.arange(num_prompts, device=reward_PG.device).repeat_interleave(group_size)
    normal_B = group_advantage(reward_PG.flatten(), groups_B, std="group", eps=_EPS, clamp=float("inf"))
    return normal_B.view(num_prompts, group_size)
