"""The map as Markdown: of each band and group, how soon each method comes to a level and where it ends.

Between two evaluations accuracy is a straight line.  A level that is passed several times counts from the first.
"""

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from benchmarks.report import table

# per cent of strict accuracy on the band's own prompts
LEVELS = (0.05, 0.10, 0.25, 0.50, 0.75)


def map_of(runs: Sequence[dict[str, Any]], bands: Sequence[str]) -> str:
    """A table a band; medians over seeds, the number of seeds behind a cell where it is not one."""
    parts = []
    for band in bands:
        own = [run for run in runs if run["band"] == band]
        if not own:
            continue
        groups = sorted({run["group"] for run in own})
        level = level_of(own)
        header = ["method"]
        for group in groups:
            header += [f"{group}: s to {level:.0%}", "mean", "end"]
        rows = [
            [method, *(cell for group in groups for cell in _cells(own, method, group, level))]
            for method in dict.fromkeys(run["method"] for run in own)
        ]
        begin = statistics.fmean(run["points"][0]["accuracy"] for run in own)
        seconds = min(run["points"][-1]["seconds"] for run in own)
        title = f"**Band {band}**, from {begin:.1%}: by groups, accuracy over {seconds:.0f} s and at their end"
        parts.append(f"{title}\n\n{table(header, rows)}")
    return "\n\n".join(parts)


def level_of(runs: Sequence[dict[str, Any]]) -> float:
    """The highest level that half of a band's runs come to: one that all come to at once says nothing."""
    reached = [
        level for level in LEVELS if sum(seconds_to(run["points"], level) < math.inf for run in runs) * 2 >= len(runs)
    ]
    return reached[-1] if reached else LEVELS[0]


def seconds_to(points: Sequence[dict[str, float]], level: float) -> float:
    """Seconds of training until accuracy is at ``level``; infinite where it never was."""
    if points[0]["accuracy"] >= level:
        return 0.0
    for before, after in pairwise(points):
        if after["accuracy"] >= level:
            share = (level - before["accuracy"]) / (after["accuracy"] - before["accuracy"])
            return before["seconds"] + share * (after["seconds"] - before["seconds"])
    return math.inf


def mean_accuracy(points: Sequence[dict[str, float]]) -> float:
    """Over the seconds of a run: the area below its curve, divided by them."""
    area = sum((b["seconds"] - a["seconds"]) * (a["accuracy"] + b["accuracy"]) / 2 for a, b in pairwise(points))
    return area / points[-1]["seconds"]


def _cells(runs: Sequence[dict[str, Any]], method: str, group: int, level: float) -> list[str]:
    own = [run["points"] for run in runs if run["method"] == method and run["group"] == group]
    if not own:
        return ["", "", ""]
    times = sorted(seconds_to(points, level) for points in own)
    middle = statistics.median(times)
    means, ends = ([f(points) for points in own] for f in (mean_accuracy, lambda points: points[-1]["accuracy"]))
    return [
        ("never" if middle == math.inf else f"{middle:.0f}") + (f" ({len(own)} seeds)" if len(own) > 1 else ""),
        f"{statistics.median(means):.1%}",
        f"{statistics.median(ends):.1%}" + (f" ({min(ends):.1%} to {max(ends):.1%})" if len(own) > 1 else ""),
    ]
