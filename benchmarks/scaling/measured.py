"""The exchanges of real iterations beside the expected ones: equal to the byte and the call, or listed.

A rank counts what it tells (``fastgrpo.distributed.traffic``) in each iteration of a whole training run, and apart from
that what it tells between iterations: evaluations, checkpoints, the beginning and the end.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.scaling.exchanges import Exchange
from fastgrpo.distributed.traffic import Collective, Traffic
from fastgrpo.profiling.profile import Step
from fastgrpo.trainer import Trainer

Counts = Counter[Collective]
# what grows with the weights; all else must be smaller than a latent
_OF_WEIGHTS = {"weights", "gradients", "gradients over nodes"}


@dataclass
class Measured:
    """Of one rank: what it told in each iteration, and otherwise."""

    iterations: list[Counts] = field(default_factory=list)
    between: Counts = field(default_factory=Counter)


@dataclass(frozen=True)
class Line:
    """Collectives of one stage, kind and payload: of an iteration how many were expected, and how many measured.

    wire_bytes: of those that were measured, through the busiest rank's link.
    """

    what: str
    stage: str
    kind: str
    payload_bytes: int
    expected_calls: int
    measured_calls: int
    wire_bytes: float

    @property
    def agrees(self) -> bool:
        return self.expected_calls == self.measured_calls


@dataclass(frozen=True)
class Outcome:
    """Of one run: its lines, the same on every rank and in every iteration, and what was not as expected.

    largest: bytes of a rank's part in the largest exchange but those of weights.  between: what else was told.
    """

    case: str
    num_ranks: int
    lines: list[Line]
    largest: float
    between: list[dict[str, Any]]
    failures: list[str]


def run(trainer: Trainer) -> Measured:
    """Train to the end, and count."""
    measured = Measured()
    with Traffic() as traffic:

        def counted(step: Step) -> dict[str, float]:
            measured.between += traffic.take()
            metrics = step()
            measured.iterations.append(traffic.take())
            return metrics

        trainer.profile = counted
        trainer.resume()
        trainer.run()
        measured.between += traffic.take()
    return measured


def compare(expected: Sequence[Exchange], counts: Mapping[Collective, int]) -> list[Line]:
    """One line for each stage, kind and payload that was expected or measured, in the order of what was expected."""
    calls: dict[tuple[str, str, int], list[int]] = {}
    names: dict[tuple[str, str, int], list[str]] = {}
    for one in expected:
        key = one.stage, one.kind, one.payload_bytes
        calls.setdefault(key, [0, 0])[0] += one.calls
        if one.what not in names.setdefault(key, []):
            names[key].append(one.what)
    wire: dict[tuple[str, str, int], float] = {}
    for collective, count in counts.items():
        key = collective.stage, collective.kind, collective.payload_bytes
        calls.setdefault(key, [0, 0])[1] += count
        wire[key] = wire.get(key, 0.0) + count * collective.wire_bytes
    return [
        Line(", ".join(names.get(key, ["not expected"])), *key, expected_calls, measured_calls, wire.get(key, 0.0))
        for key, (expected_calls, measured_calls) in calls.items()
    ]


def largest_besides_weights(lines: Sequence[Line], num_ranks: int) -> float:
    """Bytes of a rank's part in the largest exchange that is not of weights: less than a latent, so it has none."""
    sizes = [
        line.payload_bytes / (num_ranks if line.kind == "all_gather" else 1)
        for line in lines
        if not _OF_WEIGHTS.intersection(line.what.split(", "))
    ]
    return max(sizes, default=0)


def totals(lines: Sequence[Line], calls: Callable[[Line], int]) -> dict[str, tuple[int, int]]:
    """Calls and bytes of each purpose, by ``calls`` of a line."""
    found: dict[str, tuple[int, int]] = {}
    for line in lines:
        before = found.get(line.what, (0, 0))
        found[line.what] = before[0] + calls(line), before[1] + calls(line) * line.payload_bytes
    return found
