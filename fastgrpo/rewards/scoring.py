"""Asking a reward: in micro-batches that fit, again where it may help, and never taking a wrong answer.

Letters: B images, C H W of an image.
"""

import logging
import time
from dataclasses import dataclass, field

import torch
from torch import OutOfMemoryError, Tensor

from fastgrpo.rewards.reward import Reward, RewardError

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """A reward gets at most ``micro_batch`` images at a time, half as many from when they did not fit in memory.

    Rewards that run in threads have ``threads`` of them.  An exception is retried ``retries`` times, after
    ``retry_seconds`` and twice as long each further time, then it ends the run: never a silent zero.
    """

    micro_batch: int = 64
    threads: int = 4
    retries: int = 2
    retry_seconds: float = 1.0
    _fitting: dict[str, int] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.micro_batch < 1 or self.threads < 1 or self.retries < 0 or self.retry_seconds < 0:
            raise ValueError(
                "reward.scoring.micro_batch and threads must be at least 1, retries and retry_seconds at least 0, got "
                f"{self.micro_batch}, {self.threads}, {self.retries} and {self.retry_seconds}"
            )

    @torch.no_grad()
    def __call__(self, name: str, reward: Reward, images_BCHW: Tensor, texts: list[str]) -> Tensor:
        """The reward's answer as float32 [B] where the images are.  RewardError if there is none to train on."""
        size = self._fitting.get(name, self.micro_batch)
        parts = [slice(first, first + size) for first in range(0, len(texts), size)]
        try:
            return torch.cat([self._ask(name, reward, images_BCHW[part], texts[part]) for part in parts])
        except OutOfMemoryError as error:
            if size == 1:
                raise RewardError(f"reward {name!r} ran out of memory with one image: {error}") from error
            self._fitting[name] = max(1, min(size, len(texts)) // 2)
        _log.warning("reward %r ran out of memory; from now it gets %d images at a time", name, self._fitting[name])
        return self(name, reward, images_BCHW, texts)

    def _ask(self, name: str, reward: Reward, images_BCHW: Tensor, texts: list[str]) -> Tensor:
        for attempt in range(self.retries + 1):
            try:
                answer = reward(images_BCHW, texts)
                break
            except (OutOfMemoryError, RewardError):
                raise
            except Exception as error:
                if attempt == self.retries:
                    raise RewardError(
                        f"reward {name!r} raised {type(error).__name__}: {error}, {attempt + 1} times on the same "
                        f"{len(texts)} images; make it answer, or raise reward.scoring.retries if it only needs time"
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


def check_finite(name: str, reward_B: Tensor, texts: list[str]) -> None:
    """RewardError, naming image and text, if an answer is NaN or infinite."""
    bad = (~torch.isfinite(reward_B)).nonzero().flatten().tolist()
    if bad:
        raise RewardError(
            f"reward {name!r} answered {reward_B[bad[0]].item()} for image {bad[0]} ({texts[bad[0]]!r}); {len(bad)} of "
            f"its {len(texts)} answers are not finite; let it return a finite number for every image"
        )
