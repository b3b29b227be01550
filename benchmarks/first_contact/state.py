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
_SAID_OF_A_MACHINE = {"gpu", "no_gpu", "cpu", "commit", "versions"}


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
            machines = [_machine(one) for one in _of(list, told["machines"], "machines")]
            steps = {name: _record(one) for name, one in _of(dict, told["steps"], "steps").items()}
            return cls(path=path, machines=machines, steps=steps)
        # what is no text or no JSON is a ValueError, too
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} is no state of first_contact ({error}); move it away to begin anew") from None

    def write(self) -> None:
        """Whole or not at all: the machine may be taken away at any moment."""
        told = {"machines": self.machines, "steps": {name: asdict(record) for name, record in self.steps.items()}}
        unfinished = self.path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        os.replace(unfinished, self.path)


def _machine(told: Any) -> dict[str, Any]:
    """Empty where the machine was cut off, else with what the report says of it."""
    found: dict[str, Any] = _of(dict, told, "a machine")
    if missing := _SAID_OF_A_MACHINE - found.keys() if found else set():
        raise ValueError(f"a machine lacks {', '.join(sorted(missing))}")
    if found:
        _of(dict, found["versions"], "versions")
        _of(dict, found.get("unfit", {}), "unfit")
    return found


def _record(told: Any) -> Record:
    record = Record(**_of(dict, told, "a step"))
    for name, default in asdict(Record(status="")).items():
        _of((int, float) if isinstance(default, float) else type(default), getattr(record, name), name)
    for name, text in record.results.items():
        if name.endswith(".md"):
            _of(str, text, name)
    return record


def _of(kind: type | tuple[type, ...], value: Any, name: str) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{name} cannot be {json.dumps(value)[:40]}")
    return value
