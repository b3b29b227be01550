"""Timings of cases as tables, and beside the goals they are for."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any

from benchmarks.kernels.case import BASELINE, Case
from benchmarks.kernels.timing import Timing
from benchmarks.report import table

_OF_COPY = 0.9
_TIMES_EAGER = 4.0
_HEADER = [
    "case",
    "limit",
    "us",
    "us called",
    "GB/s",
    "of copy",
    "of large copy",
    "x eager",
    "x others",
    "MB",
    "MB eager",
]


@dataclass(frozen=True)
class Result:
    case: Case
    timings: dict[str, Timing] = field(default_factory=dict)
    # why there are no timings
    refused: str = ""

    @property
    def bytes_per_second(self) -> float:
        return self.case.num_bytes / self.timings["triton"].kernels.median

    @property
    def of_copy(self) -> float:
        """Share of the speed of a device copy of as many bytes."""
        return self.timings["copy"].kernels.median / self.timings["triton"].kernels.median

    def times_faster_than(self, variant: str) -> float:
        """Replayed against replayed; called against called where one of them cannot be replayed."""
        ours, other = self.timings["triton"], self.timings[variant]
        if ours.replayed is None or other.replayed is None:
            return other.called.median / ours.called.median
        return other.replayed.median / ours.replayed.median

    def to_dict(self) -> dict[str, Any]:
        case = self.case
        facts = {name: getattr(case, name) for name in ("op", "label", "limit", "num_elements")}
        facts |= {"read_bytes": case.read_bytes, "written_bytes": case.written_bytes, "refused": self.refused}
        return facts | {"seconds": {name: asdict(timing) for name, timing in self.timings.items()}}


def tables(results: Sequence[Result], large_copy: float) -> str:
    """One table an operator; ``large_copy`` is the speed of a copy of a gigabyte, in bytes per second."""
    parts = []
    for op, group in groupby(results, key=lambda result: result.case.op):
        rows = [_row(result, large_copy) for result in group]
        parts.append(f"## {op}\n\n{table(_HEADER, rows)}")
    return "\n\n".join(parts)


def goals(results: Sequence[Result]) -> list[str]:
    """What was measured, beside what was aimed at."""
    measured = [result for result in results if result.timings]
    memory = [result for result in measured if result.case.limit == "memory"]
    slow = [result for result in memory if result.of_copy < _OF_COPY]
    lines = [
        f"At least {_OF_COPY:.0%} of the measured copy bandwidth for every memory-bound op: "
        f"{len(memory) - len(slow)} of {len(memory)} cases."
        + "".join(f"  Not {one.case.op} {one.case.label}: {one.of_copy:.0%}." for one in slow)
    ]
    drawing = [result.of_copy for result in measured if result.case.limit == "drawing"]
    if drawing:
        lines.append(
            f"Ops that draw noise, modelled as bound by arithmetic: {min(drawing):.0%} to {max(drawing):.0%} of the "
            f"copy bandwidth in {len(drawing)} cases."
        )
    refits = [result for result in measured if result.case.op == "refit_moments"]
    if refits:
        moved = {result.case.num_bytes / result.case.num_elements for result in refits}
        lines.append(
            f"refit_moments independent of K in bytes: {' and '.join(f'{one:g}' for one in sorted(moved))} bytes an "
            f"element in {len(refits)} cases; {_range([one.times_faster_than(BASELINE) for one in refits])} eager, "
            "which reads stored candidates."
        )
    steps = [result.times_faster_than(BASELINE) for result in measured if result.case.op == "sde_step"]
    if steps:
        num_reached = sum(value >= _TIMES_EAGER for value in steps)
        lines.append(
            f"At least {_TIMES_EAGER:g}x eager on sde_step with log_prob: {num_reached} of {len(steps)} cases, "
            f"{_range(steps)}."
        )
    return lines + [
        f"Refused, so not timed: {one.case.op} {one.case.label}: {one.refused}" for one in results if one.refused
    ]


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.1f}x to {max(values):.1f}x"


def _row(result: Result, large_copy: float) -> list[str]:
    case, timings = result.case, result.timings
    if not timings:
        return [case.label, f"refused: {result.refused}", *["-"] * (len(_HEADER) - 2)]
    ours, eager = timings["triton"], timings[BASELINE]
    spread = ours.kernels
    others = [
        f"{name} {result.times_faster_than(name):.1f}" for name in timings if name not in ("triton", BASELINE, "copy")
    ]
    return [
        case.label,
        case.limit,
        f"{spread.median * 1e6:.1f} [{spread.lower * 1e6:.1f}, {spread.upper * 1e6:.1f}]"
        + " called" * (not ours.replayed),
        f"{ours.called.median * 1e6:.1f}",
        f"{result.bytes_per_second / 1e9:.0f}",
        f"{result.of_copy:.0%}",
        f"{result.bytes_per_second / large_copy:.0%}",
        f"{result.times_faster_than(BASELINE):.1f}",
        ", ".join(others),
        f"{ours.peak_bytes / 1e6:.0f}",
        f"{eager.peak_bytes / 1e6:.0f}",
    ]
