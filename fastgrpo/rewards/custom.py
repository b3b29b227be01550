"""A reward of the user's own, by dotted path: ``reward=custom reward.path=my_rewards.redness``.

``my_rewards.py`` lies in the working directory (or anywhere Python imports from).  ``redness`` is a function of
(images [B, 3, H, W] in [0, 1], list of B prompts) that returns B numbers, or a class whose objects are called so.
"""

import importlib
import inspect
import os
import sys
from types import ModuleType
from typing import Any

from fastgrpo.rewards.raised_at import raised_at
from fastgrpo.rewards.reward import Reward
from fastgrpo.rewards.scoring import Scoring
from fastgrpo.rewards.weighted_sum import Rewards

_MAX_NAMES = 5


def from_path(path: str) -> Reward:
    """The function at ``path``, or an object of the class at ``path``; ValueError if there is none that can be used."""
    return _reward_at(path, "reward.terms.NAME.path")


def with_custom(
    *,
    path: str,
    terms: dict[str, Reward],
    weights: dict[str, float],
    watch: dict[str, Reward],
    normalize: bool,
    golden: bool,
    scoring: Scoring,
) -> Rewards:
    """The weighted sum of ``terms`` and of the reward at ``path``, which is named ``custom``."""
    return Rewards(
        terms={"custom": _reward_at(path, "reward.path"), **terms},
        weights=weights,
        watch=watch,
        normalize=normalize,
        golden=golden,
        scoring=scoring,
    )


def _reward_at(path: str, key: str) -> Reward:
    """``key`` is the config's key that ``path`` came from."""
    module_name, _, name = path.rpartition(".")
    if not module_name or not all(part.isidentifier() for part in path.split(".")):
        raise ValueError(f"{key} is module.name, as in my_rewards.redness, got {path!r}")
    # the console script does not put the working directory on the path
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    place = f"{key}={path}"
    module = _import(module_name, place)
    if not hasattr(module, name):
        raise ValueError(f"{place}: {_file_of(module)} has no {name!r}{_others(module)}")
    found = getattr(module, name)
    reward = _construct(found, place) if inspect.isclass(found) else found
    if not callable(reward):
        raise ValueError(
            f"{place} is a {type(reward).__name__} and cannot be called; make it a function of (images, prompts), or "
            "give its class a __call__"
        )
    _check_signature(reward, place)
    return reward


def _import(module_name: str, place: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name + ".").startswith(error.name + "."):
            raise ValueError(
                f"{place}: there is no module {module_name!r}; "
                f"put {module_name.replace('.', '/')}.py into {os.getcwd()}"
            ) from error
        raise ValueError(
            f"{place}: {raised_at(error) or module_name} imports {error.name!r}, which is not installed; install it"
        ) from error
    # a file that calls sys.exit or parses the command line ends so
    except (Exception, SystemExit) as error:
        said = error.msg if isinstance(error, SyntaxError) else error
        where = raised_at(error) or module_name
        raise ValueError(f"{place}: {where}: {type(error).__name__}: {said}; mend the file") from error


def _construct(found: type, place: str) -> Any:
    try:
        return found()
    except Exception as error:
        where = f", at {line}" if (line := raised_at(error)) else ""
        raise ValueError(
            f"{place}: {found.__name__}() raised {type(error).__name__}: {error}{where}; mend it (it is made without "
            "arguments, so each needs a default)"
        ) from error


def _check_signature(reward: Reward, place: str) -> None:
    try:
        signature = inspect.signature(reward)
    except (ValueError, TypeError):
        # what is written in C does not always tell
        return
    try:
        signature.bind("images", "prompts")
    except TypeError as error:
        raise ValueError(
            f"{place} takes {signature}, but a reward is called as reward(images, prompts); give it these two"
        ) from error


def _file_of(module: ModuleType) -> str:
    return getattr(module, "__file__", None) or f"the module {module.__name__}"


def _others(module: ModuleType) -> str:
    """The functions and classes that the module defines, as the remedy for a name that it does not."""
    own = [
        name
        for name, value in vars(module).items()
        if callable(value) and not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
    ]
    names = ", ".join(f"{module.__name__}.{name}" for name in own[:_MAX_NAMES])
    return f"; it defines {names}" if own else "; define it there, or correct the path"
