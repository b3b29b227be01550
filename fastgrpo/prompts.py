"""Prompts of each iteration, in an order that depends on the seed and on nothing else.

    occurrence i = iteration * P + p        the global index of a prompt, and the id its noise is drawn from
    epoch        = i // N                   each epoch is a permutation of all N prompts, a function of (seed, epoch)
    prompt       = order(seed, epoch)[i % N]

So a resumed run, and one on any number of GPUs, sees the same prompts.  Letters: N prompts in all, P in an iteration.
"""

import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from fastgrpo.types import Prompts

# T5 reads at most 512 tokens, about 2,500 characters; a line far beyond that is not a prompt
MAX_CHARACTERS = 4000


@dataclass(frozen=True)
class PromptSource:
    """``at(iteration)`` gives the ``prompts_per_iteration`` prompts of that iteration; it holds no state."""

    texts: list[str] = field(repr=False)
    prompts_per_iteration: int
    seed: int

    def __post_init__(self) -> None:
        if not self.texts:
            raise ValueError("the list of prompts is empty; give at least one prompt")
        if self.prompts_per_iteration < 1:
            raise ValueError(f"train.prompts_per_iteration must be at least 1, got {self.prompts_per_iteration}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")

    def at(self, iteration: int) -> Prompts:
        """The prompts of one iteration, counted from 0, with their global occurrence indices."""
        if iteration < 0:
            raise ValueError(f"iterations count from 0, got {iteration}")
        first = iteration * self.prompts_per_iteration
        ids = list(range(first, first + self.prompts_per_iteration))
        return Prompts(texts=[self._text(occurrence) for occurrence in ids], ids=ids)

    def _text(self, occurrence: int) -> str:
        epoch, position = divmod(occurrence, len(self.texts))
        return self.texts[_order(self.seed, epoch, len(self.texts))[position]]


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, num_prompts: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(num_prompts)


def load_prompts(path: str | Path, key: str = "prompts.path") -> list[str]:
    """Prompts of a text file, one a line, or of a ``.jsonl`` file, one ``{"prompt": ...}`` object a line.

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
    return [_prompt(line, f"{key}: {path}:{number}", path.suffix) for number, line in enumerate(lines, start=1)]


def _prompt(line: bytes, place: str, suffix: str) -> str:
    try:
        text = line.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        remedy = "save the file as UTF-8"
        raise ValueError(f"{place}: byte {error.start + 1} of this line is not UTF-8; {remedy}") from error
    if text and suffix == ".jsonl":
        text = _prompt_of_object(text, place).strip()
    if not text:
        raise ValueError(f"{place}: blank prompt; remove the line or write a prompt")
    if "\0" in text:
        raise ValueError(f"{place}: holds a NUL character, is this a text file? remove it")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{place}: prompt of {len(text)} characters; shorten it to at most {MAX_CHARACTERS}")
    return text


def _prompt_of_object(text: str, place: str) -> str:
    remedy = 'write one {"prompt": "..."} object a line'
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not valid JSON ({error}); {remedy}") from error
    if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
        raise ValueError(f'{place}: no "prompt" string in this line; {remedy}')
    prompt: str = value["prompt"]
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise ValueError(f"{place}: half of a surrogate pair (\\ud800 ... \\udfff); write the character itself")
    return prompt
