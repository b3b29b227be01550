"""From a function's arguments to a command's settings."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

from fastgrpo.commands.line import check_words, config_of
from fastgrpo.config import goes_on
from fastgrpo.given import FILES, NOTHING, Given, name_of
from fastgrpo.overrides import key_of

# of images [B, 3, height, width], float32 in [0, 1], and B prompts: B numbers
RewardFunction = Callable[..., Any]
Directory = str | os.PathLike[str]


def config_with(
    name: str,
    settings: Sequence[str],
    *,
    run: Directory | None = None,
    given: Given = NOTHING,
    refused: Mapping[str, str] | None = None,
) -> DictConfig:
    """The checked config of a command with arguments that stand for settings.

    ``given`` is what else a program gives; ``refused`` are further keys that may not be set, and remedies.
    """
    words = list(settings)
    check_words(name, words)
    keys = {key_of(word): word for word in words}
    lists = {f"prompts.{key}" for key in FILES if given.rows(key) is not None}
    twice = dict.fromkeys(lists, "these prompts are given as a list too; leave one of the two out")
    for key, remedy in {**twice, **(refused or {})}.items():
        if key in keys:
            raise ValueError(f"{keys[key]}: {remedy}")
    if run is not None:
        if "run" in keys:
            raise ValueError(f"{keys['run']}: the run is given as run={os.fspath(run)!r} too; leave one of the two out")
        words.append(f"run={os.fspath(run)}")
    reward = given.reward
    if reward is not None:
        if not callable(reward):
            raise ValueError(
                f"reward is {reward!r} and cannot be called; give a function of (images, prompts), or name one that "
                "fastgrpo has among the settings, as 'reward=shapes'"
            )
        for key in ("reward", "reward.path"):
            if key in keys:
                raise ValueError(f"{keys[key]}: the reward is given as a function too; leave one of the two out")
        begins = [] if name == "train" and goes_on(name, settings) else ["reward=custom"]
        words = [*begins, *words, f"reward.path={name_of(reward)}"]
    return config_of(name, words)
