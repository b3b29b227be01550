"""A reward of the user's own, by dotted path: ``reward=custom reward.path=my_rewards.redness``.

``my_rewards.py`` lies in the working directory (or anywhere Python imports from).  ``redness`` is a function of
(images [B, 3, H, W] in [0, 1], list of B prompts) that returns B numbers, or a class whose objects are called so.  One
that takes a third, ``metadata``, is given what the row of each prompt says beside the text, a mapping an image.
A program gives such a function itself, ``fastgrpo.train(reward=redness)``, which need not be importable.
"""

import inspect
from typing import Any

from fastgrpo.own_code.found import find
from fastgrpo.own_code.raised_at import raised_at
from fastgrpo.rewards.reward import Reward, arguments_of
from fastgrpo.rewards.scoring import Scoring
from fastgrpo.rewards.weighted_sum import Rewards


def from_path(path: str) -> Reward:
    """The function at ``path``, or an object of the class at ``path``; ValueError if there is none that can be used."""
    return _reward_at(path, "reward.terms.NAME.path")


def with_custom(
    *,
    path: str,
    function: Reward | None = None,
    terms: dict[str, Reward],
    weights: dict[str, float],
    watch: dict[str, Reward],
    normalize: bool,
    golden: bool,
    scoring: Scoring,
) -> Rewards:
    """The weighted sum of ``terms`` and of the reward at ``path``, which is named ``custom``.

    A ``function`` that a program gives is not looked for there.
    """
    own = _reward_at(path, "reward.path") if function is None else _checked(function, f"reward={path}")
    return Rewards(
        terms={"custom": own, **terms},
        weights=weights,
        watch=watch,
        normalize=normalize,
        golden=golden,
        scoring=scoring,
    )


def _reward_at(path: str, key: str) -> Reward:
    """``key`` is the config's key that ``path`` came from."""
    return _checked(find(path, key, "my_rewards.redness"), f"{key}={path}")


def _checked(found: Any, place: str) -> Reward:
    """``found``, or an object of it where it is a class; ``place`` is where it comes from."""
    reward = _construct(found, place) if inspect.isclass(found) else found
    if not callable(reward):
        raise ValueError(
            f"{place} is a {type(reward).__name__} and cannot be called; make it a function of (images, prompts), or "
            "give its class a __call__"
        )
    _check_signature(reward, place)
    return reward


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
        places, names = arguments_of(reward, "images", "prompts", metadata=[])
        signature.bind(*places, **names)
    except TypeError as error:
        raise ValueError(
            f"{place} takes {signature}, but a reward is called as reward(images, prompts), or as reward(images, "
            "prompts, metadata) if it takes a third; give it these"
        ) from error
