"""The picture: accuracy against evaluations for each policy, and below it what other rewards say."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from benchmarks.search_at_sampling.cells import Measured, search_of

_TICKS = (10, 20, 40, 80, 160, 320)
_JUDGES = {"shapes_strict": "strict accuracy", "clip_score": "CLIP score"}


def draw(results: Sequence[Measured], path: Path) -> None:
    """Write the .png."""
    policies = list(dict.fromkeys(one.cell.policy for one in results))
    is_hacked = any(one.cell.searched == "CLIP" for one in results)
    num_rows, num_columns = (2, max(2, len(policies))) if is_hacked else (1, len(policies))
    figure = Figure(figsize=(6.5 * num_columns, 4.6 * num_rows), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(num_rows, num_columns, squeeze=False)
    for place, policy in enumerate(policies):
        own = [one for one in results if one.cell.policy == policy]
        _accuracy(axes[0][place], own, policy)
    for unused in axes[0][len(policies) :]:
        unused.axis("off")
    if is_hacked:
        for place, (judge, label) in enumerate(_JUDGES.items()):
            _hacking(axes[1][place], results, judge, label)
    figure.savefig(path)


def _accuracy(axes: Axes, results: Sequence[Measured], policy: str) -> None:
    own = [one for one in results if one.cell.searched == "verifier"]
    plain = [one for one in own if one.cell.method == "plain noise"]
    for method in dict.fromkeys(one.cell.method for one in own if one not in plain):
        # every curve begins with the plain image, but guided ones are of another policy
        is_guided = "guidance" in method
        points = [one for one in own if one.cell.method == method]
        _curve(
            axes, points if is_guided else plain + points, "shapes_strict", method, "-" if search_of(method) else ":"
        )
    _finish(axes, "strict accuracy", f"{policy} policy, searched by the verifier")


def _hacking(axes: Axes, results: Sequence[Measured], judge: str, label: str) -> None:
    methods = {one.cell.method for one in results if one.cell.searched == "CLIP"}
    for policy in dict.fromkeys(one.cell.policy for one in results):
        own = [one for one in results if one.cell.policy == policy]
        plain = [one for one in own if one.cell.method == "plain noise"]
        for method in sorted(methods):
            for searched in ("verifier", "CLIP"):
                points = [one for one in own if (one.cell.method, one.cell.searched) == (method, searched)]
                style = "-" if searched == "verifier" else "--"
                _curve(axes, plain + points, judge, f"{policy}, {method} by {searched}", style)
    _finish(axes, label, f"judged by {label}")


def _curve(axes: Axes, points: Sequence[Measured], reward: str, label: str, style: str) -> None:
    ordered = sorted(points, key=lambda one: one.evaluations)
    axes.errorbar(
        [one.evaluations for one in ordered],
        [one.mean(reward) for one in ordered],
        yerr=[one.error(reward) for one in ordered],
        fmt=f"o{style}",
        label=label,
        markersize=4,
        linewidth=1.5,
        elinewidth=0.8,
        capsize=2,
    )


def _finish(axes: Axes, label: str, title: str) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(_TICKS))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("network evaluations an image")
    axes.set_ylabel(label)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
