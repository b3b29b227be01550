"""Iterations of both sides as speeds, ratios and tables, beside the goals they are for.

Sides take turns, so the iterations of a round are neighbours in time: a ratio is the median over rounds of theirs /
ours.  On a CPU it is of CPU time, which is the clock's where a thread has a core to itself, and which other work on a
shared machine lengthens by far less.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.flow_grpo.agreement import Agreement
from benchmarks.flow_grpo.setting import Setting
from benchmarks.flow_grpo.side import Iteration
from benchmarks.kernels.timing import Quartiles, quartiles
from benchmarks.report import table

THEIRS = "flow_grpo"
PLAIN = "ours, plain"
_PARTS: dict[str, Callable[[Iteration], float]] = {
    "iteration": lambda one: one.seconds,
    "rollout": lambda one: one.rollout_seconds,
    "update": lambda one: one.update_seconds,
    "CPU time": lambda one: one.cpu_seconds,
}
# what counts, and what it makes of images
_WHOLE = {"cpu": ("CPU time", "images/CPU s"), "cuda": ("iteration", "images/s")}
_BY_THE_CLOCK = ("iteration", "rollout", "update")
_FIGURES = ["MB", "ratio deviation", "checked: ratio", "checked: gradients"]
_GOALS = {"cpu": 2.0, "cuda": 3.0}
# searched and still faster than their plain recipe
_SMART_GOAL = {"cpu": 2.0, "cuda": 1.0}


@dataclass(frozen=True, kw_only=True)
class Result:
    """One recipe: ``rounds`` [side][round]; ``baseline`` is the side that all others are compared with."""

    recipe: str
    baseline: str
    # of flow_grpo: recipe and commit
    peer: str
    settings: Mapping[str, Setting]
    rounds: Mapping[str, Sequence[Iteration]]
    device: str = "cpu"
    agreements: Mapping[str, Agreement] = field(default_factory=dict)
    # why sides were not timed
    refused: Mapping[str, str] = field(default_factory=dict)

    def alike(self, side: str) -> str | None:
        """The side of flow_grpo that computes as this one of ours does: like against like."""
        theirs = (other for other in self.rounds if other.startswith((THEIRS, PLAIN)))
        found = (other for other in theirs if self.settings[other].is_like(self.settings[side]))
        return next(found, None)

    @property
    def whole(self) -> str:
        return _WHOLE[self.device][0]

    def images_per_second(self, side: str, part: str = "") -> Quartiles:
        return quartiles([one.num_images / _PARTS[part or self.whole](one) for one in self.rounds[side]])

    def times_faster(self, side: str, part: str = "", than: str = "") -> Quartiles:
        """Of each round, than the baseline or another side."""
        seconds = _PARTS[part or self.whole]
        pairs = zip(self.rounds[than or self.baseline], self.rounds[side], strict=True)
        return quartiles([seconds(theirs) / seconds(ours) for theirs, ours in pairs])

    def to_dict(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe,
            "baseline": self.baseline,
            "peer": self.peer,
            "sides": {side: self._side(side) for side in self.rounds},
            "refused": dict(self.refused),
        }

    def _side(self, side: str) -> dict[str, Any]:
        alike = self.alike(side)
        agreement = self.agreements.get(side)
        return {
            "setting": str(self.settings[side]),
            "alike": alike,
            "agreement": asdict(agreement) if agreement else None,
            "images_per_second": {part: asdict(self.images_per_second(side, part)) for part in _PARTS},
            "times_faster": {part: asdict(self.times_faster(side, part)) for part in _PARTS},
            "times_faster_than_alike": alike and {p: asdict(self.times_faster(side, p, alike)) for p in _PARTS},
            "iterations": [asdict(one) for one in self.rounds[side]],
        }


def summary(results: Sequence[Result]) -> str:
    """One table a recipe, and what was not timed."""
    parts = []
    for result in results:
        rows = [_row(result, side) for side in result.rounds]
        refused = [f"Not timed: {side}, {why}." for side, why in result.refused.items()]
        told = [
            f"## {result.recipe}, against {result.peer}",
            table(_header(result), rows),
            *refused,
            *_unchecked(result),
        ]
        parts.append("\n\n".join(told))
    return "\n\n".join(parts)


def _header(result: Result) -> list[str]:
    clock = [f"x alike, {part} by the clock" for part in _BY_THE_CLOCK]
    return ["side", _WHOLE[result.device][1], "x baseline", "x alike", *clock, *_FIGURES]


def _row(result: Result, side: str) -> list[str]:
    rounds = result.rounds[side]
    alike = result.alike(side)
    parts = (result.whole, *_BY_THE_CLOCK)
    return [
        side,
        _spread(result.images_per_second(side), ".3g"),
        _spread(result.times_faster(side), ".2f"),
        *("" if alike in (None, side) else _spread(result.times_faster(side, p, str(alike)), ".2f") for p in parts),
        f"{max(one.peak_bytes for one in rounds) / 1e6:.0f}",
        f"{max(one.ratio_deviation for one in rounds):.1e}",
        *_figures(result.agreements.get(side)),
    ]


def _spread(values: Quartiles, form: str) -> str:
    return f"{values.median:{form}} [{values.lower:{form}}, {values.upper:{form}}]"


def _figures(one: Agreement | None) -> list[str]:
    if one is None:
        return ["", ""]
    gradient = "not compared" if one.trains_unconditional else f"{one.gradient_difference:.1e}"
    return [f"{one.ratio_deviation:.1e}", gradient]


def _unchecked(result: Result) -> list[str]:
    if not result.agreements and result.baseline != PLAIN:
        return ["None of the sides was checked in this run: another one must say that they do the same work."]
    if not result.agreements:
        return ["There was no checkout of flow_grpo: this compares our code with itself, every optimization off."]
    if any(one.trains_unconditional for one in result.agreements.values()):
        return ["Its gradient also goes through the unconditional branch, so gradients are not compared."]
    return []


def goals(results: Sequence[Result]) -> list[str]:
    """What was measured, beside what was aimed at: ours, like against like where there is a like."""
    lines = []
    for result in results:
        goal = (_SMART_GOAL if result.recipe == "smart" else _GOALS)[result.device]
        for side in result.rounds:
            if side != result.baseline and not side.startswith(THEIRS):
                than = result.alike(side) or result.baseline
                times = result.times_faster(side, than=than)
                lines.append(
                    f"{result.recipe}: {side} is {times.median:.2f}x {than} "
                    f"[{times.lower:.2f}, {times.upper:.2f}] (goal: {goal:g}x)."
                )
    return lines
