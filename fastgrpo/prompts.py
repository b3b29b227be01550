"""Prompts of each iteration, in an order that depends on the seed and on nothing else.

    occurrence i = visit * P + p            counts the prompts of one resolution, its bucket, as they come
    epoch        = i // N                   a permutation of a bucket's N prompts, of (seed, epoch, bucket)
    prompt       = order(seed, epoch, bucket)[i % N]

An iteration visits one bucket: its images are of one shape.  In a round of iterations each bucket is visited in
proportion to its N, at even distances from a random beginning: as often as its share of any number of iterations, and
all but one visit or so.  A bucket with N < P repeats its prompts.  Where no row asks for a resolution there is one
bucket, and iteration = visit.
So a resumed run, and one on any number of GPUs, sees the same prompts.  Letters: N prompts in all, P in an iteration.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

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
        resolution, texts = self._buckets[bucket]
        places = range(self.prompts_per_iteration)
        return Prompts(
            texts=[self._text(bucket, texts, visit * self.prompts_per_iteration + p) for p in places],
            ids=[iteration * self.prompts_per_iteration + p for p in places],
            resolution=resolution,
        )

    @property
    def texts(self) -> list[str]:
        return [prompt.text for prompt in self.prompts]

    def _visit(self, iteration: int) -> tuple[int, int]:
        """The bucket of an iteration, and how often it was visited before."""
        sizes = [len(texts) for _, texts in self._buckets]
        visits = tuple(size // math.gcd(*sizes) for size in sizes)
        round_, place = divmod(iteration, sum(visits))
        buckets = _round(self.seed, round_, visits)
        bucket = int(buckets[place])
        return bucket, round_ * visits[bucket] + int((buckets[:place] == bucket).sum())

    def _text(self, bucket: int, texts: list[str], occurrence: int) -> str:
        epoch, position = divmod(occurrence, len(texts))
        return texts[_order(self.seed, epoch, bucket, len(texts))[position]]

    @cached_property
    def _buckets(self) -> list[tuple[Resolution | None, list[str]]]:
        """Resolutions in the order in which the file has them, and their texts."""
        places = places_by_resolution(prompt.resolution for prompt in self.prompts)
        return [(resolution, [self.prompts[place].text for place in found]) for resolution, found in places.items()]


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


# what a model makes of a resolution: None where it is its own; ValueError where it cannot draw it
Fit = Callable[[Resolution], Resolution | None]


def num_bytes(text: str) -> int:
    """Tells which of two texts has more tokens, nearly: other scripts have fewer letters and as many tokens."""
    return len(text.encode())


def load_prompts(path: str | Path, key: str = "prompts.path", fit: Fit = lambda resolution: resolution) -> list[Prompt]:
    """Prompts of a text file, one a line, or of a ``.jsonl`` file, one ``{"prompt": ...}`` object a line.

    Such an object may have a ``"resolution"``, a whole number or [height, width], which ``fit`` may refuse.
    Raises ValueError, with the file, the line and the remedy, for anything that is not a usable prompt.  ``key`` is the
    config's key that ``path`` came from.
    """
    if not str(path):
        raise ValueError(f"{key} is empty; give the path of a prompt file")
    path = Path(path).expanduser()
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        looked_for = "" if path.is_absolute() else f" (it was looked for as {path.absolute()})"
        raise ValueError(f"prompt file {path} does not exist; check {key}{looked_for}") from error
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{key}={path} cannot be read ({why}); give a readable text file") from error
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    if not lines:
        raise ValueError(f"{key}={path} is empty; write one prompt a line")
    prompts = [_prompt(line, f"{key}: {path}:{number}", path.suffix, fit) for number, line in enumerate(lines, start=1)]
    if (number := len({prompt.resolution for prompt in prompts})) > MAX_RESOLUTIONS:
        raise ValueError(
            f"{key}={path} has {number} resolutions; use at most {MAX_RESOLUTIONS}, since kernels are compiled for each"
        )
    return prompts


def _prompt(line: bytes, place: str, suffix: str, fit: Fit) -> Prompt:
    try:
        text = line.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        remedy = "save the file as UTF-8"
        raise ValueError(f"{place}: byte {error.start + 1} of this line is not UTF-8; {remedy}") from error
    resolution = None
    if text and suffix == ".jsonl":
        row = _object(text, place)
        text, resolution = row["prompt"].strip(), _resolution(row, place, fit)
    if not text:
        raise ValueError(f"{place}: blank prompt; remove the line or write a prompt")
    if "\0" in text:
        raise ValueError(f"{place}: holds a NUL character, is this a text file? remove it")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{place}: prompt of {len(text)} characters; shorten it to at most {MAX_CHARACTERS}")
    return Prompt(text, resolution)


def _object(text: str, place: str) -> dict[str, Any]:
    remedy = 'write one {"prompt": "..."} object a line'
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not valid JSON ({error}); {remedy}") from error
    if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
        raise ValueError(f'{place}: no "prompt" string in this line; {remedy}')
    if any("\ud800" <= character <= "\udfff" for character in value["prompt"]):
        raise ValueError(f"{place}: half of a surrogate pair (\\ud800 ... \\udfff); write the character itself")
    return value


def _resolution(row: dict[str, Any], place: str, fit: Fit) -> Resolution | None:
    if "resolution" not in row:
        return None
    resolution = Resolution.read(row["resolution"], f"{place}: resolution")
    try:
        return fit(resolution)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
