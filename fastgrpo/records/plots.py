"""The curves of a run as one PNG: a panel for each thing that was measured, the evaluation first.

Text is as large as it must be to be read where the picture is printed 8 cm wide.  Speed leaves out the iterations that
compiled, and the first one, which also warms up.
"""

import io
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fastgrpo.files.whole import write_whole
from fastgrpo.records.state import is_warm

Rows = Sequence[Mapping[str, Any]]

_AXIS = {"seconds": "training time [{}], without evaluation", "iteration": "iteration", "images": "images made"}
# of training time, the longest one that the run has two of
_UNITS = (("h", 3600.0), ("min", 60.0), ("s", 1.0))
_EVALUATION = "eval/"
# scores whose sizes differ by more than this share no panel: one of them would be a line at the bottom
_ALIKE = 8.0
_INCHES_WIDE, _INCHES_OF_A_ROW = 6.2, 2.3
_POINTS_OF_TEXT = 10.0
_MOST_MARKERS = 30


@dataclass(frozen=True)
class Panel:
    """What one panel shows: metrics of the same unit, each a line."""

    title: str
    keys: tuple[str, ...]
    # which rows count
    counts: Callable[[Mapping[str, Any]], bool] = lambda _: True
    shows_median: bool = False
    starts_at_0: bool = False

    def points(self, rows: Rows, x: str, key: str) -> list[tuple[float, float]]:
        """Where and what was measured of one metric."""
        rows = [row for row in rows if self.counts(row)]
        return [(row[x], row[key]) for row in rows if row.get(key) is not None and row.get(x) is not None]

    def measured(self, rows: Rows, x: str) -> dict[str, list[tuple[float, float]]]:
        """The points of the metrics that have any."""
        return {key: points for key in self.keys if (points := self.points(rows, x, key))}


_LATER = (
    Panel("reward in training", ("reward/total",)),
    Panel("spread of rewards in a group", ("reward/group_std",), starts_at_0=True),
    Panel("share of groups without spread", ("zero_variance_groups",), starts_at_0=True),
    Panel("reward gained by noise", ("search/gain", "proposal/gain")),
    Panel("KL from the reference, an element", ("kl",), starts_at_0=True),
    Panel("drift from the old policy, an element", ("drift",), starts_at_0=True),
    Panel(
        "images/s, without compilation",
        ("images_per_second",),
        counts=is_warm,
        shows_median=True,
        starts_at_0=True,
    ),
)
# of no interest as long as they are 0
_RARE = {"zero_variance_groups", "search/gain", "proposal/gain"}


def draw_curves(rows: Rows, path: Path, *, title: str, x: str = "seconds") -> None:
    """Write the PNG; ``x`` is seconds, iteration or images.  What was not measured has no panel."""
    if x not in _AXIS:
        raise ValueError(f"x must be one of {sorted(_AXIS)}, got {x!r}")
    panels = measured_panels(rows, x)
    num_rows = max(1, math.ceil(len(panels) / 2))
    figure = Figure(figsize=(_INCHES_WIDE, 0.6 + _INCHES_OF_A_ROW * num_rows), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title if panels else f"{title}: nothing was measured", fontsize=_POINTS_OF_TEXT + 1)
    unit, size = _unit(rows) if x == "seconds" else ("", 1.0)
    grid = figure.add_gridspec(num_rows, 2)
    # where one is left over, the first has a row of its own
    is_odd = len(panels) % 2
    for index, panel in enumerate(panels):
        row, column = divmod(index + is_odd, 2)
        axes = figure.add_subplot(grid[0, :] if is_odd and index == 0 else grid[row, column])
        _draw_panel(axes, panel, rows, x, size)
        if row == num_rows - 1:
            axes.set_xlabel(_AXIS[x].format(unit) if len(panels) == 1 else _short(x, unit), fontsize=_POINTS_OF_TEXT)
    buffer = io.BytesIO()
    # matplotlib writes its version into the file otherwise: equal runs have equal pictures
    figure.savefig(buffer, format="png", metadata={"Software": None})
    write_whole(path, buffer.getvalue())


def measured_panels(rows: Rows, x: str) -> list[Panel]:
    """Those that have something to show: evaluations first, in a panel for each size of scores."""
    panels = [*_evaluations(rows), *_LATER]
    return [
        panel
        for panel in panels
        if (lines := panel.measured(rows, x))
        and not (lines.keys() <= _RARE and all(value == 0 for points in lines.values() for _, value in points))
    ]


def _evaluations(rows: Rows) -> list[Panel]:
    names = sorted({name for row in rows for name in row if name.startswith(_EVALUATION)})
    sizes = {name: max((abs(row[name]) for row in rows if row.get(name) is not None), default=0.0) for name in names}
    alike: list[list[str]] = []
    for name in sorted(names, key=lambda name: -sizes[name]):
        if alike and sizes[alike[-1][0]] <= _ALIKE * sizes[name]:
            alike[-1].append(name)
        else:
            alike.append([name])
    return [Panel("evaluation, plain noise", tuple(sorted(together))) for together in alike]


def _draw_panel(axes: Axes, panel: Panel, rows: Rows, x: str, size: float) -> None:
    lines = panel.measured(rows, x)
    for key, points in lines.items():
        at, values = [where / size for where, _ in points], [value for _, value in points]
        marker = "o" if len(points) <= _MOST_MARKERS else ""
        axes.plot(at, values, label=key.removeprefix(_EVALUATION), marker=marker, markersize=3.5, linewidth=1.8)
        if panel.shows_median:
            median = statistics.median(values)
            axes.axhline(median, color="gray", linewidth=1.0, linestyle="--", label=f"median {median:.3g}")
    axes.set_title(panel.title, fontsize=_POINTS_OF_TEXT)
    if len(lines) > 1 or panel.shows_median or panel.title.startswith("evaluation"):
        handles, labels = axes.get_legend_handles_labels()
        shown = [(handle, label) for handle, label in zip(handles, labels, strict=True) if label not in panel.keys]
        axes.legend(*zip(*shown, strict=True), fontsize=_POINTS_OF_TEXT - 1, frameon=False)
    if panel.starts_at_0:
        # room for a line at the top, and for one that is 0 throughout
        top = max(value for points in lines.values() for _, value in points)
        axes.set_ylim(0.0, 1.1 * top if top > 0 else 1.0)
    longest = max((row[x] for row in rows if row.get(x) is not None), default=0.0) / size
    axes.set_xlim(-0.02 * longest, 1.02 * longest or 1.0)
    axes.tick_params(labelsize=_POINTS_OF_TEXT - 1)
    # small numbers as 2 and 1e-4, which is narrower
    axes.ticklabel_format(axis="y", scilimits=(-3, 5))
    axes.yaxis.get_offset_text().set_fontsize(_POINTS_OF_TEXT - 1)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _unit(rows: Rows) -> tuple[str, float]:
    longest = max((row["seconds"] for row in rows if row.get("seconds") is not None), default=0.0)
    return next(((unit, size) for unit, size in _UNITS if longest >= 2 * size), _UNITS[-1])


def _short(x: str, unit: str) -> str:
    return f"training time [{unit}]" if x == "seconds" else _AXIS[x]
