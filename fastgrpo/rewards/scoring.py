"""Asking a reward: in micro-batches that fit, again where it may help, and never taking a wrong answer.

What a reward raises decides what is done about it:
    out of memory          half as many images at a time, from then on
    OSError, HTTPException, RewardUnavailable
                           what happens to connections, disks and other machines may pass: it is asked again
    RewardError            the reward's own last word: the run ends
    a failure of the GPU   nobody's mistake, and nothing computes in this process any more: it ends by that
    anything else          a mistake in a program, which no waiting mends: the run ends with the line of the user's file

Letters: B images, C H W of an image.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.client import HTTPException

import torch
from torch import Tensor

from fastgrpo.device_error import is_device_error
from fastgrpo.out_of_memory import is_out_of_memory, release
from fastgrpo.own_code.raised_at import raised_at
from fastgrpo.rewards.answers import as_rewards
from fastgrpo.rewards.reward import Reward, RewardError, RewardUnavailable, answer_of
from fastgrpo.types import Prompt, as_prompts

_MAY_PASS = (OSError, HTTPException, RewardUnavailable)
_KEY = "reward.scoring"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """A reward gets at most ``micro_batch`` images at a time, half as many from when they did not fit in memory.

    Rewards that run in threads have ``threads`` of them.  What may pass is asked again ``retries`` times, after
    ``retry_seconds`` and twice as long each further time, then it ends the run: never a silent zero.
    """

    micro_batch: int = 64
    threads: int = 4
    retries: int = 2
    retry_seconds: float = 1.0
    _fitting: dict[str, int] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for key, least in (("micro_batch", 1), ("threads", 1), ("retries", 0), ("retry_seconds", 0)):
            if not getattr(self, key) >= least:
                raise ValueError(f"{_KEY}.{key} must be at least {least}, got {getattr(self, key)}")

    @torch.no_grad()
    def __call__(self, name: str, reward: Reward, images_BCHW: Tensor, prompts: Sequence[Prompt | str]) -> Tensor:
        """The reward's answer as float32 [B] where the images are.  RewardError if there is none to train on.

        A failure of the GPU comes through as it was raised.
        """
        size, asked = self._fitting.get(name, self.micro_batch), as_prompts(prompts)
        parts = [slice(first, first + size) for first in range(0, len(asked), size)]
        try:
            return torch.cat([self._ask(name, reward, images_BCHW[part], asked[part]) for part in parts])
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                raise RewardError(f"reward {name!r} ran out of memory with one image: {error}") from error
            release(error)
            self._fitting[name] = max(1, min(size, len(asked)) // 2)
        _log.warning("reward %r ran out of memory; from now it gets %d images at a time", name, self._fitting[name])
        return self(name, reward, images_BCHW, asked)

    def _ask(self, name: str, reward: Reward, images_BCHW: Tensor, asked: list[Prompt]) -> Tensor:
        for attempt in range(self.retries + 1):
            try:
                answer = answer_of(reward, images_BCHW, asked)
                return as_rewards(name, answer, len(asked), images_BCHW.device)
            except _MAY_PASS as error:
                if attempt == self.retries:
                    raise RewardError(
                        f"reward {name!r} raised {type(error).__name__}: {error}, {attempt + 1} times on the same "
                        f"{len(asked)} images; make it answer, or raise {_KEY}.retries if it only needs time"
                    ) from error
                seconds = self.retry_seconds * 2**attempt
                _log.warning("reward %r raised %s: %s; again in %g s", name, type(error).__name__, error, seconds)
                time.sleep(seconds)
            except RewardError:
                raise
            except Exception as error:
                if is_device_error(error) or is_out_of_memory(error):
                    raise
                raise RewardError(_mistake(name, error)) from error
        raise AssertionError("the last attempt returns or raises")


def _mistake(name: str, error: Exception) -> str:
    said = f"reward {name!r} raised {type(error).__name__}: {error}"
    if where := raised_at(error):
        return f"{said}, at {where}; correct it there, or raise RewardUnavailable for what may pass"
    # a piece of this package says in its own words what to do
    return said if isinstance(error, ValueError) else f"{said}; FASTGRPO_TRACEBACK=1 shows where"
