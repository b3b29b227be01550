"""What a reward is: a function of images and their prompts, one number an image; more is better.

One that takes a parameter ``metadata``, or a third one without a default, is given a mapping an image there as well:
what the row of its prompt says beside the text, of which nothing is left out but ``resolution`` and
``negative_prompt``.  It is empty where a row says no more.

A reward may say more about itself by attributes:
    in_thread   True if it computes on the CPU or waits for another machine: it is then called from threads, with images
                on the CPU, while the GPU goes on.  Default False: it computes where the images are.
    golden_set  the pairs it is tried on before a run: a name in golden_set/, default ``scenes``, a ``GoldenSet``, or
                ``none`` for a judge that knows certain prompts only; ``prompts``, the default of one that asks for
                metadata, are the scenes with the run's own prompts: it must answer, and may answer anything
    check_prompt  a method that raises ValueError for a prompt it cannot judge: all prompts are checked before a run; it
                may ask for metadata, too
    greet       a method without arguments that raises RewardError where nobody is there to answer: tried before a run
    golden_tolerance  how far their scores may lie from recorded ones, as a share of the spread; default 0.02
"""

import inspect
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, Protocol

from torch import Tensor, nn

from fastgrpo.types import Prompt


class Reward(Protocol):
    """Any function or object that is called as ``reward(images, prompts)`` or ``reward(images, prompts, metadata)``.

    It needs no base class.  images: float32 [B, 3, height, width] in [0, 1].  prompts: list of B texts.  metadata: list
    of B dicts, copies of its own.
    """

    # its signature is looked at, and mypy takes any for one of these
    def __call__(self, *arguments: Any, **metadata: Any) -> Any:
        """Rewards [B], a tensor; a list or array of B numbers will do."""
        ...


class RewardError(ValueError):
    """A reward that failed, or whose answer cannot be trained on.  Nobody asks again after it."""


class RewardUnavailable(RewardError):
    """A reward that cannot answer now and may later: raised by a reward, it is asked again (``Scoring``)."""


def answer_of(reward: Reward, images_BCHW: Tensor, asked: Sequence[Prompt]) -> Any:
    """What a reward answers, with metadata if it asks for it."""
    metadata = [prompt.metadata for prompt in asked]
    places, names = arguments_of(reward, images_BCHW, [prompt.text for prompt in asked], metadata=metadata)
    return reward(*places, **names)


def check_prompt_of(reward: Reward, prompt: Prompt) -> None:
    """ValueError for a prompt that the reward says it cannot judge."""
    if (check := getattr(reward, "check_prompt", None)) is not None:
        places, names = arguments_of(check, prompt.text, metadata=prompt.metadata)
        check(*places, **names)


def asks_for_metadata(reward: Callable[..., Any], num_others: int = 2) -> bool:
    """Whether it takes a parameter ``metadata``, or one without a default after the others."""
    return _place_of_metadata(reward, num_others) is not None


def arguments_of(function: Callable[..., Any], *others: Any, metadata: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What it is called with, by place and by name: with a copy of the metadata if it asks for them."""
    place = _place_of_metadata(function, len(others))
    if place is None:
        return others, {}
    # a reward may take out of it what it needs; images of one prompt would share one copy of a list
    given = [deepcopy(row) for row in metadata] if isinstance(metadata, list) else deepcopy(metadata)
    return (others, {place: given}) if place else ((*others, given), {})


def _place_of_metadata(function: Callable[..., Any], num_others: int) -> str | None:
    """The name to pass it by, '' for the next place, None for a function that does not ask."""
    try:
        # a module's own call takes anything
        called = function.forward if isinstance(function, nn.Module) else function
        parameters = list(inspect.signature(called).parameters.values())
    except (ValueError, TypeError):
        # what is written in C does not always tell
        return None
    by_place = [one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)][num_others:]
    by_name = [one for one in parameters if one.kind == one.KEYWORD_ONLY]
    by_name += [one for one in by_place if one.kind == one.POSITIONAL_OR_KEYWORD]
    if any(one.name == "metadata" for one in by_name):
        return "metadata"
    is_next = bool(by_place) and (by_place[0].default is inspect.Parameter.empty or by_place[0].name == "metadata")
    return "" if is_next else None
