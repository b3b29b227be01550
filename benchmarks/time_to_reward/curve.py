"""What a run writes: its accuracy over seconds of training, and when that passes a level.

Between two evaluations accuracy is a straight line.  A level that is passed several times counts from the first.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

LEVELS = tuple(hundredths / 100 for hundredths in range(50, 95, 5))


@dataclass(frozen=True, kw_only=True)
class Point:
    """One evaluation: after how much training, and strict accuracy on each half of the held-out prompts.

    graded: the graded reward of the same images, all halves.  reward: of the images that were trained on since the last
    evaluation, their mean; NaN before the first iteration.
    """

    seconds: float
    images: int
    tuning: float
    reported: float
    graded: float
    reward: float


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A run of a side with one learning rate and seed; ``settings`` is the side as it was."""

    side: str
    settings: str
    learning_rate: float
    seed: int
    points: tuple[Point, ...]

    @classmethod
    def of_dict(cls, data: dict[str, Any]) -> "Curve":
        points = tuple(Point(**_numbers(point)) for point in data["points"])
        return cls(**data | {"points": points})

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; NaN, which JSON has not, as text."""
        points = [
            {name: value if math.isfinite(value) else repr(value) for name, value in asdict(point).items()}
            for point in self.points
        ]
        return asdict(self) | {"points": points}

    @property
    def final(self) -> float:
        return self.points[-1].reported

    @property
    def images_per_second(self) -> float:
        return self.points[-1].images / self.points[-1].seconds

    @property
    def tuned_by(self) -> float:
        """What a learning rate is chosen by: mean accuracy on the tuning half in the later half of the run."""
        later = [p.tuning for p in self.points if p.seconds >= self.points[-1].seconds / 2]
        return math.fsum(later) / len(later)

    def seconds_to(self, level: float) -> float:
        """Seconds of training until the reported half is at ``level``; infinite where it never was."""
        return self._first(level, lambda point: point.seconds)

    def images_to(self, level: float) -> float:
        return self._first(level, lambda point: point.images)

    def accuracy_at(self, seconds: float) -> float:
        """Of the reported half; beyond the last evaluation that of the last."""
        for before, after in pairwise(self.points):
            if before.seconds <= seconds < after.seconds:
                share = (seconds - before.seconds) / (after.seconds - before.seconds)
                return before.reported + share * (after.reported - before.reported)
        return self.final

    def _first(self, level: float, cost: Callable[[Point], float]) -> float:
        if self.points[0].reported >= level:
            return cost(self.points[0])
        for before, after in pairwise(self.points):
            if after.reported >= level:
                share = (level - before.reported) / (after.reported - before.reported)
                return cost(before) + share * (cost(after) - cost(before))
        return math.inf


def median(values: Sequence[float]) -> float:
    """The middle one; infinite values count, so that seeds which never came there are not forgotten."""
    ordered = sorted(values)
    upper, lower = ordered[len(ordered) // 2], ordered[(len(ordered) - 1) // 2]
    return (lower + upper) / 2


def _numbers(point: dict[str, Any]) -> dict[str, Any]:
    """NaN is text in JSON."""
    return {name: float(value) if isinstance(value, str) else value for name, value in point.items()}
