"""What is known so far, in one JSON file that goes from machine to machine.

A step without a record was never begun, and one that is "begun" was cut off with its machine: both are for the next.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.first_contact.runner import COMPLETE, FAILED, TIMED_OUT

BEGUN, NOT_REACHED = "begun", "not reached"


@dataclass(kw_only=True)
class Record:
    """A step on the ``machine``-th machine; ``results`` are the files that it wrote, Markdown as text, JSON as read.

    ``log`` is the last that it printed, where it failed or wrote no Markdown.
    """

    status: str
    reason: str = ""
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    machine: int = 0
    results: dict[str, Any] = field(default_factory=dict)
    log: str = ""

    def is_settled(self, again: bool) -> bool:
        """Whether the next machine leaves it alone; ``again`` tries what failed once more."""
        return self.status == COMPLETE or (self.status in (FAILED, TIMED_OUT) and not again)


@dataclass(kw_only=True)
class State:
    """``machines`` are what the environment step found on each, in order."""

    path: Path
    machines: list[dict[str, Any]] = field(default_factory=list)
    steps: dict[str, Record] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "State":
        """That of an earlier machine, or an empty one; ValueError where the file is not one."""
        if not path.exists():
            return cls(path=path)
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            steps = {name: Record(**record) for name, record in told["steps"].items()}
            return cls(path=path, machines=told["machines"], steps=steps)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no state of first_contact ({error}); move it away to begin anew") from None

    def write(self) -> None:
        """Whole or not at all: the machine may be taken away at any moment."""
        told = {"machines": self.machines, "steps": {name: asdict(record) for name, record in self.steps.items()}}
        unfinished = self.path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        os.replace(unfinished, self.path)
