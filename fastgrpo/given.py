"""What a program gives beside a config: a reward that is a function, prompts that are a list, and an event to stop by.

The config names them all the same, so that a run says what it was made of: ``reward.path`` is the function's
``module.qualname``, ``prompts.path`` and ``prompts.held_out`` are files of the run directory, to which it writes lists.
"""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from fastgrpo.files.whole import write_whole
from fastgrpo.prompts import Fit, load_prompts
from fastgrpo.rewards.reward import Reward
from fastgrpo.types import Prompt

# a text, or what a line of a .jsonl file has
Row = str | Mapping[str, Any]
# of the keys prompts.path and prompts.held_out, in the run directory
FILES = {"path": "prompts.jsonl", "held_out": "held_out_prompts.jsonl"}


@dataclass(frozen=True, kw_only=True)
class Given:
    """Each None is as the config has it; ``rows`` are by their keys in the group ``prompts``."""

    reward: Reward | Callable[..., Any] | None = None
    path: Sequence[Row] | None = None
    held_out: Sequence[Row] | None = None
    stop: Event | None = None

    def is_stopped(self) -> bool:
        """Whether the program wants no further iteration."""
        return self.stop is not None and self.stop.is_set()

    def rows(self, key: str) -> Sequence[Row] | None:
        """Those of ``prompts.<key>``."""
        return {"path": self.path, "held_out": self.held_out}[key]

    def prompts(self, key: str, fit: Fit, column: str = "") -> list[Prompt] | None:
        """Those rows, read as a file of them would be; ValueError with the number of a row that is no prompt."""
        rows = self.rows(key)
        if rows is None:
            return None
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / FILES[key]
            path.write_bytes(_lines(rows))
            try:
                return load_prompts(path, f"prompts.{key}", fit, column)
            except ValueError as error:
                said = str(error).replace(f"{path}:", "row ").replace(str(path), "the list that was given")
                raise ValueError(said) from error

    def compare(self, directory: Path) -> None:
        """ValueError where other lists lie in a run's directory than are given."""
        for path, lines in self._files(directory):
            if path.exists() and path.read_bytes() != lines:
                raise ValueError(
                    f"the run in {directory} began with other prompts than are given, see {path}; give those, or none, "
                    "which takes them from there"
                )

    def keep(self, directory: Path) -> None:
        """Write the lists into a run's directory."""
        for path, lines in self._files(directory):
            write_whole(path, lines)

    def _files(self, directory: Path) -> list[tuple[Path, bytes]]:
        return [(directory / name, _lines(rows)) for key, name in FILES.items() if (rows := self.rows(key)) is not None]


NOTHING = Given()


def name_of(reward: Reward | Callable[..., Any]) -> str:
    """``module.qualname`` of a function, or of an object's class."""
    named: Any = reward if hasattr(reward, "__qualname__") else type(reward)
    return f"{named.__module__}.{named.__qualname__}"


def _lines(rows: Sequence[Row]) -> bytes:
    if isinstance(rows, str):
        raise ValueError(f"prompts are a list of texts, got the text {rows!r}; write [{rows!r}]")
    objects = [{"prompt": row} if isinstance(row, str) else row for row in rows]
    for number, row in enumerate(objects, start=1):
        if not isinstance(row, Mapping):
            raise ValueError(f"row {number} of the prompts is {row!r}; give a text, or a mapping as a .jsonl file has")
    try:
        return "".join(json.dumps(dict(row)) + "\n" for row in objects).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"prompts cannot be written as JSON ({error}); give plain values") from error
