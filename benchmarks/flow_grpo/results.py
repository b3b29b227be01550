"""Iterations of both sides as speeds, ratios and tables, beside the goals they are for.

Sides take turns, so the iterations of a round are neighbours in time: a ratio is the median over rounds of ours /
theirs.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.flow_grpo.agreement import Agreement
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
_HEADER = [
    "side",
    "images/s",
    *(f"images/s of {part} alone" for part in ("rollout", "update")),
    *(f"x {part}" for part in _PARTS),
    "MB",
    "ratio deviation",
]
_GOALS = {"cpu": 2.0, "cuda": 3.0}
# searched and still faster than their plain recipe
_SMART_GOAL = {"cpu": 2.0, "cuda": 1.0}


@dataclass(frozen=True)
class Result:
    """``rounds`` [side][round]; ``baseline`` is the side that others are compared with."""

    recipe: str
    baseline: str
    # of flow_grpo: recipe and commit
    peer: str
    rounds: dict[str, list[Iteration]]
    agreement: Agreement | None = None

    def images_per_second(self, side: str, part: str = "iteration") -> Quartiles:
        return quartiles([one.num_images / _PARTS[part](one) for one in self.rounds[side]])

    def times_faster(self, side: str, part: str = "iteration") -> Quartiles:
        """Of each round, than the baseline."""
        seconds = _PARTS[part]
        pairs = zip(self.rounds[self.baseline], self.rounds[side], strict=True)
        return quartiles([seconds(theirs) / seconds(ours) for theirs, ours in pairs])

    def to_dict(self) -> dict[str, Any]:
        sides = {
            side: {
                "images_per_second": {part: asdict(self.images_per_second(side, part)) for part in _PARTS},
                "times_faster": {part: asdict(self.times_faster(side, part)) for part in _PARTS},
                "iterations": [asdict(one) for one in rounds],
            }
            for side, rounds in self.rounds.items()
        }
        return {
            "recipe": self.recipe,
            "baseline": self.baseline,
            "peer": self.peer,
            "agreement": asdict(self.agreement) if self.agreement else None,
            "sides": sides,
        }


def summary(results: Sequence[Result]) -> str:
    """One table a recipe, and what was checked."""
    parts = []
    for result in results:
        rows = [_row(result, side) for side in result.rounds]
        parts.append(f"## {result.recipe}, against {result.peer}\n\n{table(_HEADER, rows)}\n\n{_checked(result)}")
    return "\n\n".join(parts)


def _row(result: Result, side: str) -> list[str]:
    rounds = result.rounds[side]
    return [
        side,
        *(_spread(result.images_per_second(side, part), ".3g") for part in ("iteration", "rollout", "update")),
        *(_spread(result.times_faster(side, part), ".2f") for part in _PARTS),
        f"{max(one.peak_bytes for one in rounds) / 1e6:.0f}",
        f"{max(one.ratio_deviation for one in rounds):.1e}",
    ]


def _spread(values: Quartiles, form: str) -> str:
    return f"{values.median:{form}} [{values.lower:{form}}, {values.upper:{form}}]"


def _checked(result: Result) -> str:
    one = result.agreement
    if one is None:
        return "There was no checkout of flow_grpo: this compares our code with itself, every optimization off."
    gradient = (
        "; its gradient also goes through the unconditional branch, so gradients are not compared"
        if one.trains_unconditional
        else f"; gradients differ by {one.gradient_difference:.1e} of their length"
    )
    verdict = "the same work" if one.holds else f"NOT the same work (tolerance {one.tolerance:g})"
    return f"Checked: {verdict}.  On our samples its ratio is within {one.ratio_deviation:.1e} of 1{gradient}."


def goals(results: Sequence[Result], device: str) -> list[str]:
    """What was measured, beside what was aimed at."""
    lines = []
    for result in results:
        goal = (_SMART_GOAL if result.recipe == "smart" else _GOALS)[device]
        for side in result.rounds:
            if side != result.baseline:
                times = result.times_faster(side)
                lines.append(
                    f"{result.recipe}: {side} is {times.median:.2f}x {result.baseline} "
                    f"[{times.lower:.2f}, {times.upper:.2f}] (goal: {goal:g}x)."
                )
    return lines
