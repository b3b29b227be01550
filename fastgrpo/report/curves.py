"""Curves of all metrics: a panel each, the runs in it by color, against seconds, images or iterations.

The page's script switches the axis of all panels, hides a run in all of them, and smooths: it finds what it changes by
the names in ``Curves.handles``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from bokeh.models import ColumnDataSource, DataRange1d, HoverTool
from bokeh.models.renderers import DataRenderer
from bokeh.plotting import figure

from fastgrpo.records.metrics import METRICS
from fastgrpo.report.run import AXES, Run
from fastgrpo.report.thinning import thinned

FIRST_AXIS = "seconds"
# so that a page of long runs stays small: points of all curves, of one of them, and the fewest it may come down to
_MOST_POINTS, _MOST_OF_ONE, _LEAST_OF_ONE = 60_000, 1000, 60
# Okabe and Ito's, told apart also by who sees colors otherwise, without the yellow that is faint on white
_COLORS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#333333")
# up to so many points each is marked
_MARKED = 60
# what ends in / stands for all that begin so; the last group is of all others
_GROUPS = (
    ("Evaluation and reward", "eval/ reward/ zero_variance_groups"),
    (
        "Training",
        "loss kl drift approx_kl ratio_deviation velocity_deviation clip_fraction grad_norm skipped_steps "
        "optimizer_steps learning_rate",
    ),
    ("Search and learned start noise", "search/ proposal/"),
    ("Speed and memory", "images_per_second seconds/ peak_bytes compilations"),
    ("Others", "/"),
)


@dataclass(frozen=True)
class Panel:
    """One metric's plot, what the metric means, and how many of its values were not finite."""

    metric: str
    meaning: str
    num_missing: int
    plot: figure


@dataclass(frozen=True)
class Curves:
    """Panels by group, and the names by which the page's script finds sources, axes and lines of each run."""

    groups: list[tuple[str, list[Panel]]]
    handles: dict[str, list[str]]
    most_points: int
    is_thinned: bool


def color_of(run: int) -> str:
    """Of the run with this number; after seven they begin again."""
    return _COLORS[run % len(_COLORS)]


def draw_curves(runs: Sequence[Run]) -> Curves:
    """A panel for each metric that any of the runs has."""
    metrics = list(dict.fromkeys(name for run in runs for name in run.metrics if any(run.points(name))))
    num_series = max(1, len(metrics) * len(runs))
    most = max(_LEAST_OF_ONE, min(_MOST_OF_ONE, _MOST_POINTS // num_series))
    drawing = _Drawing(runs, most)
    left, groups = dict.fromkeys(metrics), []
    for title, words in _GROUPS:
        # in the order of the group's words, then in that in which they were measured
        own = [name for word in words.split() for name in left if _is_of(name, word)]
        left = {name: None for name in left if name not in own}
        if own:
            groups.append((title, [drawing.panel(name) for name in own]))
    return Curves(groups, drawing.handles, most, drawing.is_thinned)


def meaning_of(metric: str) -> str:
    """The metric in words, empty for one that nothing explains."""
    return METRICS.get(metric) or METRICS.get(f"{metric.split('/')[0]}/<name>", "")


def _is_of(metric: str, word: str) -> bool:
    return word in ("/", metric) or (word.endswith("/") and metric.startswith(word))


@dataclass
class _Drawing:
    runs: Sequence[Run]
    most: int
    handles: dict[str, list[str]] = field(default_factory=lambda: {"sources": [], "axes": []})
    is_thinned: bool = False
    # one for all panels: who zooms into one sees the same stretch of the others
    x_range: DataRange1d = field(default_factory=lambda: DataRange1d(range_padding=0.02))

    def panel(self, metric: str) -> Panel:
        points = [run.points(metric) for run in self.runs]
        values = [abs(value) for of_run in points for _, value in of_run]
        # a quantity that does not change is drawn at its own scale, not between one less and one more
        y_range = DataRange1d(default_span=0.2 * max(values, default=0.0) or 1.0)
        plot = figure(
            y_range=y_range,
            height=230,
            sizing_mode="stretch_width",
            x_range=self.x_range,
            tools="box_zoom,pan,reset,save",
            name=metric,
        )
        plot.toolbar.logo, plot.toolbar.autohide = None, True
        plot.outline_line_color = plot.ygrid.grid_line_color = plot.xgrid.grid_line_color = "#e4e4e7"
        plot.xaxis.axis_label, plot.xaxis.name = AXES[FIRST_AXIS], f"axis {metric}"
        plot.xaxis.axis_label_text_font_style = "normal"
        plot.min_border_right = 12
        self.handles["axes"].append(f"axis {metric}")
        lines = [self._line(plot, metric, number, of_run) for number, of_run in enumerate(points) if of_run]
        tips = [("run", "@run")] * (len(self.runs) > 1)
        tips += [(metric, "@value{%.6g}"), ("iteration", "@iteration{0}"), ("seconds", "@seconds{0.0}")]
        hover = HoverTool(renderers=lines, mode="vline", formatters={"@value": "printf"})
        hover.tooltips = [*tips, ("images", "@images{0,0}")]
        plot.add_tools(hover)
        return Panel(metric, meaning_of(metric), sum(run.num_missing(metric) for run in self.runs), plot)

    def _line(
        self, plot: figure, metric: str, number: int, points: Sequence[tuple[dict[str, float], float]]
    ) -> DataRenderer:
        """Of the run of that number."""
        values = np.array([value for _, value in points])
        kept = thinned(values, self.most)
        self.is_thinned |= len(kept) < len(points)
        columns = {axis: np.array([points[i][0].get(axis, np.nan) for i in kept]) for axis in AXES}
        source = ColumnDataSource(
            {**columns, "x": columns[FIRST_AXIS], "value": values[kept], "y": values[kept]},
            name=(name := f"{metric} {number}"),
        )
        source.data["run"] = [self.runs[number].name] * len(kept)
        self.handles["sources"].append(name)
        color, names = color_of(number), self.handles.setdefault(f"run {number}", [])
        drawn: list[DataRenderer] = [
            plot.line("x", "value", source=source, color=color, alpha=0.25),
            line := plot.line("x", "y", source=source, color=color, line_width=1.8),
        ]
        if len(kept) <= _MARKED:
            drawn.append(plot.scatter("x", "y", source=source, color=color, size=5))
        for place, renderer in enumerate(drawn):
            renderer.name = f"{name} {place}"
            names.append(renderer.name)
        return line
