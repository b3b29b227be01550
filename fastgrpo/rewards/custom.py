"""A reward of the user's own, by dotted path: ``reward=custom reward.path=my_rewards.redness``.

``my_rewards.py`` lies in the working directory (or anywhere Python imports from).  ``redness`` is a function of
(images [B, 3, H, W] in [0, 1], list of B prompts) that returns a tensor [B], or a class whose objects are called so.
"""

import importlib
import inspect
import os
import sys

from fastgrpo.rewards.reward import Reward
from fastgrpo.rewards.scoring import Scoring
from fastgrpo.rewards.weighted_sum import Rewards


def from_path(path: str) -> Reward:
    """The function at ``path``, or an object of the class at ``path``; ValueError if there is none."""
    module_name, _, name = path.rpartition(".")
    if not module_name or not name:
        raise ValueError(f"a reward's path is module.name, as in my_rewards.redness, got {path!r}")
    # the console script does not put the working directory on the path
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name + ".").startswith(error.name + "."):
            raise ValueError(
                f"there is no module {module_name!r} for reward {path!r}; "
                f"put {module_name.replace('.', '/')}.py into {os.getcwd()}"
            ) from error
        raise ValueError(f"reward {path!r} imports {error.name!r}, which is not installed; install it") from error
    if not hasattr(module, name):
        raise ValueError(f"{module.__file__} has no {name!r} for reward {path!r}; define it there, or correct the path")
    found = getattr(module, name)
    reward = found() if inspect.isclass(found) else found
    if not callable(reward):
        raise ValueError(
            f"reward {path!r} is a {type(reward).__name__} and cannot be called; "
            "make it a function of (images, prompts), or give its class a __call__"
        )
    return reward


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
        terms={"custom": from_path(path), **terms},
        weights=weights,
        watch=watch,
        normalize=normalize,
        golden=golden,
        scoring=scoring,
    )
