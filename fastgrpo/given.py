"""What a program gives beside a config: a reward that is a function, prompts that are a list, and an event to stop by.

The config names them all the same, so that a run says what it was made of: ``reward.path`` is the function's
``module.qualname``, ``prompts.path`` and ``prompts.held_out`` are files of the run directory, to which it writes lists.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from fastgrpo.files.whole import write_whole
from fastgrpo.prompt_files import plain_rows
from fastgrpo.prompts import Fit, prompts_of
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
        return None if rows is None else prompts_of(rows, f"prompts.{key}", fit, column)

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
        return [
            (directory / name, _lines(rows, key)) for key, name in FILES.items() if (rows := self.rows(key)) is not None
        ]


NOTHING = Given()


def name_of(reward: Reward | Callable[..., Any]) -> str:
    """``module.qualname`` of a function, or of an object's class."""
    named: Any = reward if hasattr(reward, "__qualname__") else type(reward)
    return f"{named.__module__}.{named.__qualname__}"


def _lines(rows: Sequence[Row], key: str) -> bytes:
    # a text alone stays one: its column may be called otherwise in the mappings beside it
    return "".join(f"{json.dumps(value)}\n" for _, value in plain_rows(rows, f"prompts.{key}")).encode()
