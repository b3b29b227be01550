"""The curves as a picture: of each side the median over seeds as a line, their range as a band."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.time_to_reward.curve import Curve

_POINTS = 200
_STYLES = ("-", "--", ":")
_COLORS = 10


def draw(curves: Mapping[str, Sequence[Curve]], path: Path, *, axis: str) -> None:
    """Write the .png; ``axis`` says what seconds are of."""
    figure = Figure(figsize=(11, 6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for index, (side, runs) in enumerate(curves.items()):
        # as far as all seeds come
        seconds = np.linspace(0, min(run.points[-1].seconds for run in runs), _POINTS)
        values = np.array([[run.accuracy_at(second) for second in seconds] for run in runs])
        color, style = f"C{index % _COLORS}", _STYLES[index // _COLORS % len(_STYLES)]
        axes.plot(seconds, np.median(values, axis=0), style, color=color, label=side, linewidth=1.6)
        axes.fill_between(seconds, values.min(axis=0), values.max(axis=0), color=color, alpha=0.12, linewidth=0)
    axes.set_xlabel(axis)
    axes.set_ylabel("strict accuracy on held-out prompts")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    # beside the curves, best first: inside it would hide some of them
    order = sorted(range(len(curves)), key=lambda i: -float(np.median([run.final for run in list(curves.values())[i]])))
    handles, labels = axes.get_legend_handles_labels()
    figure.legend([handles[i] for i in order], [labels[i] for i in order], loc="outside right upper", frameon=False)
    figure.savefig(path)
