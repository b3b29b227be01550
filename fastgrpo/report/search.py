"""What a run's search saw: the candidates of some groups with their scores, those that it chose, and their images'.

Two plots a run: scores over training, and the estimates of chosen noises against the rewards of the images.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from bokeh.models import ColumnDataSource, FixedTicker, HoverTool
from bokeh.plotting import figure

from fastgrpo.report.run import Run, number

# iterations that are drawn, evenly from the first to the last that was recorded
MOST_ITERATIONS = 12
_CANDIDATE, _CHOSEN, _IMAGE = "#94a3b8", "#d55e00", "#0072b2"


@dataclass(frozen=True)
class SearchPage:
    """``scatter`` is None where nothing was estimated; ``said`` is how many of the recorded iterations are drawn."""

    scores: figure
    scatter: figure | None
    said: str
    is_of_images: bool


@dataclass(frozen=True)
class _Dots:
    """Columns of a plot's source: place, score, and what the pointer is told."""

    name: str
    color: str
    rows: list[tuple[float, float, str, int, str]]

    def draw(self, plot: figure, size: float, alpha: float) -> None:
        columns = zip(*self.rows, strict=True) if self.rows else ((),) * 5
        names = ("x", "y", "prompt", "iteration", "which")
        source = ColumnDataSource(dict(zip(names, map(list, columns), strict=True)))
        plot.scatter("x", "y", source=source, size=size, alpha=alpha, color=self.color, legend_label=self.name)


def search_page(run: Run, place_of_run: int = 0) -> SearchPage | None:
    """Of the run at this place of its report; None for one that searched nothing, or did not record it."""
    rows = [row for row in run.searches if row.get("groups")]
    if not rows:
        return None
    places = sorted({round(place) for place in np.linspace(0, len(rows) - 1, MOST_ITERATIONS)})
    drawn = [rows[place] for place in places]
    is_of_images = drawn[0].get("scores") == "images"
    said = f"{len(drawn)} of {len(rows)} recorded iterations" if len(drawn) < len(rows) else ""
    scatter = _scatter(drawn) if any(_pairs(row) for row in drawn) else None
    return SearchPage(_scores(drawn, is_of_images, f"scores {place_of_run}"), scatter, said, is_of_images)


def _scores(rows: list[dict[str, Any]], is_of_images: bool, name: str) -> figure:
    plot = _plot("iteration; in it a column a group", "reward of an image" if is_of_images else "reward")
    plot.name = name
    tried, word = ("images of all attempts", "attempt") if is_of_images else ("candidates, estimated", "round")
    seen, chosen, images = _Dots(tried, _CANDIDATE, []), _Dots("chosen, estimated", _CHOSEN, []), []
    for column, row in enumerate(rows):
        for place, group in enumerate(row["groups"]):
            x = column + 0.22 * (place - (len(row["groups"]) - 1) / 2)
            for r, scores in enumerate(group["rounds"], start=1):
                seen.rows.extend(_dots(x - 0.055, scores, group["prompt"], row["iteration"], f"{word} {r}"))
            chosen.rows.extend(
                _dots(x, group["chosen"] or (), group["prompt"], row["iteration"], "estimate of a start")
            )
            images.extend(_dots(x + 0.055, group["rewards"], group["prompt"], row["iteration"], "reward of an image"))
    seen.draw(plot, size=5, alpha=0.45)
    if chosen.rows:
        chosen.draw(plot, size=6, alpha=0.9)
    _Dots("images trained on", _IMAGE, images).draw(plot, size=6, alpha=0.7)
    plot.xaxis.ticker = FixedTicker(ticks=list(range(len(rows))))
    plot.xaxis.major_label_overrides = {column: str(row["iteration"]) for column, row in enumerate(rows)}
    plot.xgrid.visible = False
    _finish(plot)
    return plot


def _scatter(rows: list[dict[str, Any]]) -> figure:
    plot = _plot("estimate of the start noise", "reward of its image")
    dots = [
        (estimate, reward, prompt, row["iteration"], "") for row in rows for estimate, reward, prompt in _pairs(row)
    ]
    values = [value for estimate, reward, *_ in dots for value in (estimate, reward)]
    ends = [min(values), max(values)]
    plot.line(ends, ends, color="#a1a1aa", line_dash="dashed", legend_label="equal")
    _Dots("an image", _IMAGE, dots).draw(plot, size=6, alpha=0.55)
    _finish(plot)
    return plot


def _pairs(row: dict[str, Any]) -> list[tuple[float, float, str]]:
    return [
        (estimate, reward, group["prompt"])
        for group in row["groups"]
        for estimate, reward in zip(group["chosen"] or (), group["rewards"], strict=False)
        if number(estimate) is not None and number(reward) is not None
    ]


def _dots(x: float, scores: Any, prompt: str, iteration: int, which: str) -> list[tuple[float, float, str, int, str]]:
    return [(x, score, prompt, iteration, which) for score in scores if number(score) is not None]


def _plot(x: str, y: str) -> figure:
    plot = figure(height=320, sizing_mode="stretch_width", tools="box_zoom,pan,reset,save")
    plot.toolbar.logo, plot.toolbar.autohide = None, True
    plot.xaxis.axis_label, plot.yaxis.axis_label = x, y
    plot.xaxis.axis_label_text_font_style = plot.yaxis.axis_label_text_font_style = "normal"
    plot.outline_line_color = plot.ygrid.grid_line_color = plot.xgrid.grid_line_color = "#e4e4e7"
    hover = HoverTool(formatters={"@y": "printf"})
    hover.tooltips = [("", "@which"), ("score", "@y{%.6g}"), ("prompt", "@prompt"), ("iteration", "@iteration")]
    plot.add_tools(hover)
    return plot


def _finish(plot: figure) -> None:
    plot.legend.click_policy, plot.legend.orientation = "hide", "horizontal"
    plot.legend.border_line_color, plot.legend.background_fill_alpha = None, 0.7
    plot.add_layout(plot.legend[0], "above")
