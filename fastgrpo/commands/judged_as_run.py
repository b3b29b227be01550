"""What a run was judged by: its rewards, its held-out prompts and how it was evaluated, for commands that judge it.

What the command line names wins.  The run's config is data: a reward of the user's own, or one that is sent a token, is
taken from the line alone.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fastgrpo.algorithm.image_search import NoSearch
from fastgrpo.overrides import key_of, line_of, quoted
from fastgrpo.own_code.found import OF_A_PROGRAM
from fastgrpo.own_code.named import PIECES, check_named, check_values
from fastgrpo.parts import read_search

_PLAIN = ("prompts", "evaluate")


def take_judgement(own: DictConfig, saved: DictConfig, source: Path, overrides: Sequence[str]) -> None:
    """Put into ``own``, the config of a command, what ``saved`` has, that of a run in the file ``source``.

    ValueError for a reward that the line has to name.
    """
    line = line_of([quoted(override) for override in overrides])
    named = {re.split(r"[./]", key_of(override))[0] for override in overrides}
    # without held-out prompts a command draws, and asks the reward only what to search for
    judges = OmegaConf.select(own, "prompts.held_out") is not None
    searches = "search" in own and not isinstance(read_search(own), NoSearch)
    takes_reward = (judges or searches) and "reward" in own and not named & {"reward", "reward_backend"}
    if takes_reward and (reward := _plain(saved, "reward", source)):
        _check_reward(reward, source)
        own.reward = reward
    if not judges:
        return
    chosen = set(map(key_of, overrides))
    for group in [group for group in _PLAIN if group in own and group not in chosen]:
        for key, value in _plain(saved, group, source).items():
            if key in own[group] and f"{group}.{key}" not in line:
                own[group][key] = value


def _check_reward(reward: Mapping[str, Any], source: Path) -> None:
    try:
        check_named({"reward": reward}, source, {}, PIECES)
    except ValueError as error:
        if OF_A_PROGRAM in str(error):
            # which no line can name
            raise
        raise ValueError(
            f"{source}: the run's reward has code of your own or is sent a token, so the command has to name it as the "
            "run did, as in reward=custom reward.path=my_rewards.redness; another reward= judges it otherwise"
        ) from error


def _plain(saved: DictConfig, group: str, source: Path) -> dict[str, Any]:
    found = OmegaConf.select(saved, group)
    plain: Any = OmegaConf.to_container(found, resolve=False) if OmegaConf.is_dict(found) else {}
    check_values(plain, group, source)
    return {str(key): value for key, value in plain.items()}
