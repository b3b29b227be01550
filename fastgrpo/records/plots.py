"""The curves of a run: reward, evaluation, distances and speed over training time, as one PNG."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fastgrpo.files.whole import write_whole

_AXIS = {"seconds": "training time [s], without evaluation", "iteration": "iteration", "images": "images made"}
# title, unit, and which keys it shows; a key that ends in / stands for all that begin with it
_PANELS = (
    ("reward in training", "mean reward", ("reward/total",)),
    ("evaluation, plain noise", "mean score", ("eval/",)),
    ("distance from the reference: kl, from the old policy: drift", "per latent element", ("kl", "drift")),
    ("speed", "images/s", ("images_per_second",)),
)


def draw_curves(rows: Sequence[dict[str, Any]], path: Path, *, title: str, x: str = "seconds") -> None:
    """Write the PNG; ``x`` is seconds, iteration or images.  A quantity that was not measured says so in its panel."""
    if x not in _AXIS:
        raise ValueError(f"x must be one of {sorted(_AXIS)}, got {x!r}")
    figure = Figure(figsize=(10, 6.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for axes, (name, unit, keys) in zip(figure.subplots(2, 2).flat, _PANELS, strict=True):
        _draw_panel(axes, rows, x, keys)
        axes.set_title(name, fontsize=11)
        axes.set_ylabel(unit)
        axes.set_xlabel(_AXIS[x])
        if unit == "images/s":
            axes.set_ylim(bottom=0.0)
    buffer = io.BytesIO()
    # matplotlib writes its version into the file otherwise: equal runs have equal pictures
    figure.savefig(buffer, format="png", metadata={"Software": None})
    write_whole(path, buffer.getvalue())


def _draw_panel(axes: Axes, rows: Sequence[dict[str, Any]], x: str, keys: Sequence[str]) -> None:
    names = sorted({name for row in rows for name in row if _shows(name, keys)})
    drawn = 0
    for name in names:
        points = [(row[x], row[name]) for row in rows if row.get(name) is not None and row.get(x) is not None]
        if points:
            marker = "o" if len(points) <= 50 else ""
            axes.plot(*zip(*points, strict=True), label=name, marker=marker, markersize=3, linewidth=1.4)
            drawn += 1
    if drawn == 0:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color="gray")
    elif drawn > 1 or names != [keys[0]]:
        axes.legend(fontsize=8, frameon=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _shows(name: str, keys: Sequence[str]) -> bool:
    return any(name.startswith(key) if key.endswith("/") else name == key for key in keys)
