"""The tables of a measurement, and what they divide by: the best of the sides that are Flow-GRPO's own code."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.report import table
from benchmarks.time_to_reward.curve import LEVELS, Curve, median
from benchmarks.time_to_reward.sides import BASELINES

_NEVER = "-"


@dataclass(frozen=True, kw_only=True)
class Results:
    """Of each side its runs, one a seed; ``tuned`` are those that its learning rate was chosen by."""

    curves: Mapping[str, Sequence[Curve]]
    tuned: Mapping[str, Sequence[Curve]]

    @property
    def baseline(self) -> str | None:
        """Of flow_grpo's own code what ends best; None where it was not run."""
        able = [side for side in self.curves if side in BASELINES]
        return max(able, key=self.final) if able else None

    def final(self, side: str) -> float:
        """Accuracy at the end, the mean over seeds."""
        return statistics.fmean(curve.final for curve in self.curves[side])

    def seconds_to(self, side: str, level: float) -> list[float]:
        return [curve.seconds_to(level) for curve in self.curves[side]]

    def times_sooner(self, side: str, level: float) -> float | None:
        """Median seconds of the baseline to ``level``, divided by this side's; infinite where only it comes there."""
        if self.baseline is None:
            return None
        own, theirs = (median(self.seconds_to(name, level)) for name in (side, self.baseline))
        return theirs / own if 0 < own < math.inf else None

    def summary(self) -> str:
        return "\n\n".join(
            [
                "## Sides",
                table(*self._sides()),
                "## Seconds of training to an accuracy",
                table(*self._by_level(self._seconds)),
                "## Images to an accuracy",
                table(*self._by_level(self._images)),
                "## Times sooner than " + (self.baseline or "flow_grpo's own code, which was not run"),
                table(*self._by_level(self._ratio)),
                "## Tuning",
                table(*self._tuning()),
            ]
        )

    def _sides(self) -> tuple[list[str], list[list[str]]]:
        rows = []
        for side, curves in self.curves.items():
            ends = [curve.final for curve in curves]
            row = [
                side,
                f"{curves[0].learning_rate:g}",
                f"{statistics.fmean(curve.images_per_second for curve in curves):.1f}",
                f"{curves[0].points[0].reported:.3f}",
                f"{statistics.fmean(ends):.3f}",
                f"{min(ends):.3f} to {max(ends):.3f}",
                f"{_rise(curves):+.3f}",
            ]
            if self.baseline:
                goal = self.final(self.baseline)
                seconds = self.seconds_to(side, goal)
                # at the end of their time, or when they first were so good
                whole = statistics.fmean(curve.points[-1].seconds for curve in self.curves[self.baseline])
                theirs, own = min(whole, median(self.seconds_to(self.baseline, goal))), median(seconds)
                row += [_spread(seconds), f"{theirs / own:.2f}" if 0 < own < math.inf else _NEVER]
            rows.append(row)
        header = ["side", "learning rate", "images/s", "accuracy before", "at the end, mean", "range", "reward rise"]
        if self.baseline:
            reached = f"{self.final(self.baseline):.3f}"
            header += [f"seconds to {reached}, where {self.baseline} ends", "times sooner"]
        return header, rows

    def _by_level(self, cell: Callable[[str, float], str]) -> tuple[list[str], list[list[str]]]:
        header = ["side", *(f"{level:.2f}" for level in LEVELS)]
        return header, [[side, *(cell(side, level) for level in LEVELS)] for side in self.curves]

    def _seconds(self, side: str, level: float) -> str:
        return _spread(self.seconds_to(side, level))

    def _images(self, side: str, level: float) -> str:
        return _spread([curve.images_to(level) for curve in self.curves[side]])

    def _ratio(self, side: str, level: float) -> str:
        ratio = self.times_sooner(side, level)
        if ratio is None:
            return _NEVER
        return f"{ratio:.2f}" if ratio < math.inf else "only this side"

    def _tuning(self) -> tuple[list[str], list[list[str]]]:
        rates = sorted({curve.learning_rate for curves in self.tuned.values() for curve in curves})
        rows = []
        for side, curves in self.tuned.items():
            by_rate = {curve.learning_rate: f"{curve.tuned_by:.3f}" for curve in curves}
            rows.append([side, *(by_rate.get(rate, _NEVER) for rate in rates)])
        return ["side", *(f"{rate:g}" for rate in rates)], rows


def _spread(values: Sequence[float]) -> str:
    """Median, range, and how many seeds came there, if not all."""
    there = [value for value in values if value < math.inf]
    if not there:
        return _NEVER
    middle = median(values)
    text = f"{middle:.0f}" if middle < math.inf else _NEVER
    if len(values) > 1:
        text += f" ({min(there):.0f} to {f'{max(values):.0f}' if len(there) == len(values) else _NEVER})"
    return text if len(there) == len(values) else f"{text}, {len(there)} of {len(values)} seeds"


def _rise(curves: Sequence[Curve]) -> float:
    """Of the training reward, from the first evaluation interval to the last, the mean over seeds."""
    return statistics.fmean(curve.points[-1].reward - curve.points[1].reward for curve in curves)
