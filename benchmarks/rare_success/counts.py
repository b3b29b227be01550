"""Successes and images of captions, as they are gathered over several measurements, in a file of JSON."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Counts:
    """By measurement and caption: (successes, images)."""

    by_measurement: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Counts":
        """Those of a file, or none where there is no such file."""
        return cls.of(json.loads(path.read_text())) if path.exists() else cls()

    @classmethod
    def of(cls, found: Mapping[str, Mapping[str, list[int]]]) -> "Counts":
        return cls({name: {text: (n[0], n[1]) for text, n in part.items()} for name, part in found.items()})

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(self.by_measurement, indent=1) + "\n")

    def with_more(self, found: Mapping[str, tuple[int, int]], measurement: str) -> "Counts":
        """With another portion of a measurement; ValueError where it has a caption already."""
        there = self.by_measurement.get(measurement, {})
        if twice := there.keys() & found.keys():
            raise ValueError(f"{measurement!r} has {sorted(twice)[0]!r} already; measure with another --seed")
        return Counts({**self.by_measurement, measurement: {**there, **found}})

    @property
    def total(self) -> dict[str, tuple[int, int]]:
        """Of each caption over all measurements."""
        successes, images = Counter[str](), Counter[str]()
        for part in self.by_measurement.values():
            for text, (right, number) in part.items():
                successes[text] += right
                images[text] += number
        return {text: (successes[text], images[text]) for text in images}


def wilson(successes: int, images: int) -> tuple[float, float]:
    """The 95% Wilson score interval of a rate."""
    z = 1.959964
    rate, wide = successes / images, z * z / images
    middle = (rate + wide / 2) / (1 + wide)
    half = z * math.sqrt(rate * (1 - rate) / images + wide / (4 * images)) / (1 + wide)
    return max(middle - half, 0.0), min(middle + half, 1.0)
