"""The picture of the first screen: images before and after training, beside accuracy over training time."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.report import RESULTS
from benchmarks.time_to_reward.curve import Curve

_IMAGES = "default_run_cpu_202611_e5cc436ec_before_after"
# of that picture: where its second to fourth row are in the last three columns
_CROP = (548, 214, 1358, 760)
_SIDES = {
    "nft": ("fastgrpo, nft (default)", "C3"),
    "nft_code_7_steps": ("DiffusionNFT's own code", "C0"),
    "flow_grpo_code_fast_ema_1": ("flow_grpo's own code, fast", "0.25"),
    "flow_grpo_code_no_kl_ema_1": ("flow_grpo's own code, full", "0.6"),
}


def draw(path: Path, sides: Mapping[str, list[Curve]]) -> None:
    """Write the .png."""
    figure = Figure(figsize=(11, 4.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.3, 1.0))
    left.imshow(np.asarray(Image.open(RESULTS / f"{_IMAGES}.png").convert("RGB").crop(_CROP)), interpolation="lanczos")
    left.set_axis_off()
    left.set_title("held-out prompts, before (left of each pair) and after 10 minutes of fastgrpo train", fontsize=10)
    for side, (label, color) in _SIDES.items():
        _draw_side(right, sides[side], label, color)
    right.set_xlabel("training time [s], one CPU core")
    right.set_ylabel("held-out prompts drawn right")
    right.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    right.set_xlim(0, 300)
    right.set_title("the same model, prompts, reward and batch", fontsize=10)
    right.grid(alpha=0.25)
    right.spines[["top", "right"]].set_visible(False)
    right.legend(fontsize=8.5, frameon=False, loc="upper left")
    figure.savefig(path, metadata={"Software": None})


def _draw_side(axes: Axes, runs: list[Curve], label: str, color: str) -> None:
    """The median over seeds as a line, their range as a band."""
    seconds = np.linspace(0, min(run.points[-1].seconds for run in runs), 200)
    values = np.array([[run.accuracy_at(second) for second in seconds] for run in runs])
    axes.plot(seconds, np.median(values, axis=0), color=color, label=label, linewidth=1.8)
    axes.fill_between(seconds, values.min(axis=0), values.max(axis=0), color=color, alpha=0.12, linewidth=0)


def time_to_reward(data: Mapping[str, list[dict[str, object]]]) -> dict[str, list[Curve]]:
    return {side: [Curve.of_dict(curve) for curve in data[side]] for side in _SIDES}
