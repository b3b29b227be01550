"""Prompts of each iteration, in an order that depends on the seed and on nothing else.

    occurrence i = visit * P + p            counts the prompts of one resolution, its bucket, as they come
    epoch        = i // N                   a permutation of a bucket's N prompts, of (seed, epoch, bucket)
    prompt       = order(seed, epoch, bucket)[i % N]

An iteration visits one bucket: its images are of one shape.  In a round of iterations each bucket is visited in
proportion to its N, at even distances from a random beginning: as often as its share of any number of iterations, and
all but one visit or so.  A bucket with N < P repeats its prompts.  Where no row asks for a resolution there is one
bucket, and iteration = visit.
So a resumed run, and one on any number of GPUs, sees the same prompts.

What a row says beside its text is part of its ``Prompt``, the one thing that travels, from the file to the rewards: a
list of metadata beside the texts would have to be kept in step by everybody who takes, repeats or spreads them.  Texts
alone do for whoever has nothing else to say.
Letters: N prompts in all, P in an iteration.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from fastgrpo.prompt_files import PromptFile, Row, read_prompt_file, read_prompt_list
from fastgrpo.resolution import MAX_RESOLUTIONS, Resolution, places_by_resolution
from fastgrpo.types import Prompt, Prompts

# T5 reads at most 512 tokens, about 2,500 characters; a line far beyond that is not a prompt
MAX_CHARACTERS = 4000
# no bucket has this number
_VISITS = 1000


@dataclass(frozen=True)
class PromptSource:
    """``at(iteration)`` gives the ``prompts_per_iteration`` prompts of that iteration; it holds no state."""

    prompts: Sequence[Prompt] = field(repr=False)
    prompts_per_iteration: int
    seed: int

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("the list of prompts is empty; give at least one prompt")
        if self.prompts_per_iteration < 1:
            raise ValueError(f"train.prompts_per_iteration must be at least 1, got {self.prompts_per_iteration}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")

    def at(self, iteration: int) -> Prompts:
        """The prompts of one iteration, counted from 0, with their global occurrence indices."""
        if iteration < 0:
            raise ValueError(f"iterations count from 0, got {iteration}")
        bucket, visit = self._visit(iteration)
        resolution, prompts = self._buckets[bucket]
        places = range(self.prompts_per_iteration)
        return Prompts(
            [self._prompt(bucket, prompts, visit * self.prompts_per_iteration + p) for p in places],
            ids=[iteration * self.prompts_per_iteration + p for p in places],
            resolution=resolution,
        )

    @property
    def texts(self) -> list[str]:
        return [prompt.text for prompt in self.prompts]

    def _visit(self, iteration: int) -> tuple[int, int]:
        """The bucket of an iteration, and how often it was visited before."""
        sizes = [len(prompts) for _, prompts in self._buckets]
        visits = tuple(size // math.gcd(*sizes) for size in sizes)
        round_, place = divmod(iteration, sum(visits))
        buckets = _round(self.seed, round_, visits)
        bucket = int(buckets[place])
        return bucket, round_ * visits[bucket] + int((buckets[:place] == bucket).sum())

    def _prompt(self, bucket: int, prompts: list[Prompt], occurrence: int) -> Prompt:
        epoch, position = divmod(occurrence, len(prompts))
        return prompts[_order(self.seed, epoch, bucket, len(prompts))[position]]

    @cached_property
    def _buckets(self) -> list[tuple[Resolution | None, list[Prompt]]]:
        """Resolutions in the order in which the file has them, and their prompts."""
        places = places_by_resolution(prompt.resolution for prompt in self.prompts)
        return [(resolution, [self.prompts[place] for place in found]) for resolution, found in places.items()]


@lru_cache(maxsize=4)
def _round(seed: int, round_: int, visits: tuple[int, ...]) -> np.ndarray:
    """The buckets of a round's iterations: bucket b at (k + phase_b) / visits_b of the round, k = 0, 1, ..."""
    phases = np.random.default_rng((seed, round_, _VISITS)).random(len(visits))
    times = [(np.arange(number) + phase) / number for number, phase in zip(visits, phases, strict=True)]
    return np.repeat(np.arange(len(visits)), visits)[np.concatenate(times).argsort(kind="stable")]


@lru_cache(maxsize=4 * MAX_RESOLUTIONS)
def _order(seed: int, epoch: int, bucket: int, num_prompts: int) -> np.ndarray:
    # without buckets, as runs were begun that are resumed
    key = (seed, epoch, bucket) if bucket else (seed, epoch)
    return np.random.default_rng(key).permutation(num_prompts)


# what a model makes of a prompt, whose resolution may be its own; ValueError for one that it cannot draw
Fit = Callable[[Prompt], Prompt]


def num_bytes(text: str) -> int:
    """Tells which of two texts has more tokens, nearly: other scripts have fewer letters and as many tokens."""
    return len(text.encode())


def texts_to_encode(prompts: Iterable[Prompt]) -> list[str]:
    """The different texts that a model is given for them, of both branches of guidance."""
    both = ((prompt.text, prompt.negative) for prompt in prompts)
    return list(dict.fromkeys(text for texts in both for text in texts if text is not None))


def longest(prompts: Sequence[Prompt]) -> Prompt:
    """The one that takes most memory, with the longest negative text of any."""
    negatives = [prompt.negative for prompt in prompts if prompt.negative is not None]
    return replace(
        max(prompts, key=lambda prompt: num_bytes(prompt.text)),
        negative=max(negatives, key=num_bytes) if negatives else None,
    )


def load_prompts(
    path: str | Path, key: str = "prompts.path", fit: Fit = lambda prompt: prompt, column: str = ""
) -> list[Prompt]:
    """Prompts of a file of one of the formats of ``prompt_files``, whose texts are in ``column``; '' finds it by name.

    A row may have a ``resolution``, a whole number or [height, width], and a ``negative_prompt``, which ``fit`` may
    refuse; all else is metadata.  Raises ValueError, with the file, the line and the remedy, for anything that is not a
    usable prompt.  ``key`` is the config's key that ``path`` came from.
    """
    return _prompts(load_prompt_file(path, key, column), f"{key}={path}", fit)


def prompts_of(
    values: Sequence[str | Mapping[str, Any]], key: str, fit: Fit = lambda prompt: prompt, column: str = ""
) -> list[Prompt]:
    """The same of a list of texts, or of mappings as a .jsonl file has them."""
    return _prompts(read_prompt_list(values, key, column), f"{key}: the list that was given", fit)


def load_prompt_file(path: str | Path, key: str = "prompts.path", column: str = "") -> PromptFile:
    """The same rows, as the file has them."""
    if not str(path):
        raise ValueError(f"{key} is empty; give the path of a prompt file")
    return read_prompt_file(Path(path).expanduser(), key, column)


def _prompts(file: PromptFile, where: str, fit: Fit) -> list[Prompt]:
    prompts = [_prompt(row, fit) for row in file.rows]
    if (number := len({prompt.resolution for prompt in prompts})) > MAX_RESOLUTIONS:
        raise ValueError(
            f"{where} has {number} resolutions; use at most {MAX_RESOLUTIONS}, since kernels are compiled for each"
        )
    return prompts


def _prompt(row: Row, fit: Fit) -> Prompt:
    others = dict(row.others)
    resolution = _resolution(others.pop("resolution"), row.place) if "resolution" in others else None
    negatives = [others.pop(name) for name in list(others) if _is_negative(name)]
    if len(negatives) > 1:
        raise ValueError(f"{row.place}: several negative prompts; leave one")
    negative = _text(negatives[0], f"{row.place}: negative_prompt") if any(negatives) else ""
    text = _text(row.text, row.place)
    if not text:
        raise ValueError(f"{row.place}: blank prompt; remove the line or write a prompt")
    try:
        return fit(Prompt(text, resolution, others, negative or None))
    except ValueError as error:
        raise ValueError(f"{row.place}: {error}") from error


def _is_negative(name: str) -> bool:
    return re.sub(r"[\s-]+", "_", name.strip().lower()) == "negative_prompt"


def _text(value: object, place: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{place} is {value!r}; write a string, or leave it out")
    text = value.strip()
    if "\0" in text:
        raise ValueError(f"{place}: holds a NUL character, is this a text file? remove it")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{place}: prompt of {len(text)} characters; shorten it to at most {MAX_CHARACTERS}")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{place}: half of a surrogate pair (\\ud800 ... \\udfff); write the character itself")
    return text


def _resolution(value: object, place: str) -> Resolution | None:
    if isinstance(value, str) and not value.strip():
        # a table has the column in every row
        return None
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    return Resolution.read(value, f"{place}: resolution")
