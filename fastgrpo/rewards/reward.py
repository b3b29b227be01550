"""What a reward is, and the weighted sum of several.

    total = sum over terms of weight * reward

A reward sees images and their prompts and answers one number an image; more is better.  Terms make up the total that is
trained on; watched rewards are computed and logged, and train nothing.  Letters: P prompts, G samples of a prompt,
B = P * G images, prompt-major.
"""

import logging
import time
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from fastgrpo import types

_log = logging.getLogger(__name__)


class Reward(Protocol):
    """Any function or object that is called like this; it needs no base class."""

    def __call__(self, images_BCHW: Tensor, prompts: list[str], /) -> Tensor:
        """Rewards [B] of float32 images in [0, 1], one prompt an image."""
        ...


class RewardError(ValueError):
    """A reward that failed, or whose answer cannot be trained on."""


@dataclass(frozen=True, kw_only=True)
class Rewards:
    """The weighted sum of ``terms``; ``watch`` is logged beside it.

    A reward gets at most ``micro_batch`` images at a time.  An exception is retried ``retries`` times, after
    ``retry_seconds`` and twice as long each further time, then it ends the run: never a silent zero.
    """

    terms: dict[str, Reward]
    weights: dict[str, float]
    watch: dict[str, Reward] = field(default_factory=dict)
    micro_batch: int = 64
    retries: int = 2
    retry_seconds: float = 1.0

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
        for name, reward in (self.terms | self.watch).items():
            if not callable(reward):
                raise ValueError(
                    f"reward {name!r} is {reward!r}, which cannot be called; see reward=custom for your own"
                )
        if self.micro_batch < 1 or self.retries < 0 or self.retry_seconds < 0:
            raise ValueError(
                f"reward.micro_batch must be at least 1, retries and retry_seconds at least 0, "
                f"got {self.micro_batch}, {self.retries} and {self.retry_seconds}"
            )

    def __call__(self, images_BCHW: Tensor, prompts: list[str]) -> types.Rewards:
        """Every reward of the images of P prompts, B a multiple of P, each prompt's images in a row."""
        num_prompts = len(prompts)
        if num_prompts == 0 or len(images_BCHW) % num_prompts:
            raise ValueError(
                f"{len(images_BCHW)} images are not a whole number of images for each of {num_prompts} prompts"
            )
        texts = [text for text in prompts for _ in range(len(images_BCHW) // num_prompts)]
        named_B = self._answers(self.terms | self.watch, images_BCHW, texts)
        named_PG = {name: reward_B.reshape(num_prompts, -1) for name, reward_B in named_B.items()}
        return types.Rewards(named=named_PG, total_PG=self._total(named_PG))

    def score(self, images_BCHW: Tensor, texts: list[str]) -> Tensor:
        """The total [B] alone, one text an image: what a noise search asks for."""
        return self._total(self._answers(self.terms, images_BCHW, texts))

    def _total(self, named: dict[str, Tensor]) -> Tensor:
        return torch.stack([self.weights[name] * named[name] for name in self.terms]).sum(dim=0)

    @torch.no_grad()
    def _answers(self, rewards: dict[str, Reward], images_BCHW: Tensor, texts: list[str]) -> dict[str, Tensor]:
        if len(texts) != len(images_BCHW):
            raise ValueError(f"{len(images_BCHW)} images but {len(texts)} texts; give every image one text")
        rows = [slice(i, i + self.micro_batch) for i in range(0, len(texts), self.micro_batch)]
        answers = {}
        for name, reward in rewards.items():
            parts = [self._ask(name, reward, images_BCHW[part], texts[part]) for part in rows]
            answers[name] = torch.cat(parts)
            _check_finite(name, answers[name], texts)
        return answers

    def _ask(self, name: str, reward: Reward, images_BCHW: Tensor, texts: list[str]) -> Tensor:
        """One micro-batch: the reward's answer as float32 [B] where the images are."""
        for attempt in range(self.retries + 1):
            try:
                answer = reward(images_BCHW, texts)
                break
            except Exception as error:
                if attempt == self.retries:
                    raise RewardError(
                        f"reward {name!r} raised {type(error).__name__}: {error}, {attempt + 1} times on the same "
                        f"{len(texts)} images; make it answer, or raise reward.retries if it only needs more time"
                    ) from error
                seconds = self.retry_seconds * 2**attempt
                _log.warning("reward %r raised %s: %s; again in %g s", name, type(error).__name__, error, seconds)
                time.sleep(seconds)
        if not isinstance(answer, Tensor) or answer.shape != (len(texts),):
            what = f"shape {list(answer.shape)}" if isinstance(answer, Tensor) else f"a {type(answer).__name__}"
            raise RewardError(
                f"reward {name!r} answered {what} for {len(texts)} images; return a tensor [{len(texts)}]"
            )
        return answer.to(images_BCHW.device, torch.float32)


def _check_finite(name: str, reward_B: Tensor, texts: list[str]) -> None:
    # the one moment at which a GPU is waited for
    bad = (~torch.isfinite(reward_B)).nonzero().flatten().tolist()
    if bad:
        raise RewardError(
            f"reward {name!r} answered {reward_B[bad[0]].item()} for image {bad[0]} ({texts[bad[0]]!r}); {len(bad)} of "
            f"its {len(texts)} answers are not finite; let it return a finite number for every image"
        )
