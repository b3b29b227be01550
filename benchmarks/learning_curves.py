"""Which recipe learns the embedded model fastest: equal training seconds, several seeds, plain-noise evaluation.

    python -m benchmarks.learning_curves --minutes 10

Every run is the command a user would type, with one CPU thread; ``--parallel`` runs go side by side.  The curve is
strict accuracy on the held-out prompts (EMA weights, plain noise) over seconds of training, search included.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.report import RESULTS, table, write_report
from fastgrpo.records.json_lines import read_rows

METRIC = "eval/shapes_strict"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="training time of each run")
    parser.add_argument(
        "--recipes",
        nargs="+",
        default=["smart_grpo", "smart_grpo:algorithm/noise=gaussian", "flow_grpo", "flow_grpo_fast"],
        help="each a recipe, with overrides of its own after colons",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--images-per-prompt", type=int, default=8, help="of an evaluation")
    parser.add_argument("--parallel", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("outputs/learning_curves"))
    parser.add_argument("overrides", nargs="*", help="further key=value for every run")
    arguments = parser.parse_args()
    # seeds outside: a stop in the middle leaves whole comparisons
    runs = [(recipe, seed) for seed in arguments.seeds for recipe in arguments.recipes]
    with ThreadPoolExecutor(arguments.parallel) as pool:
        list(pool.map(lambda run: _train(run[0], run[1], arguments), runs))
    curves = {
        recipe: [_curve(_directory(recipe, seed, arguments)) for seed in arguments.seeds]
        for recipe in arguments.recipes
    }
    _report(curves, arguments)


def _train(recipe: str, seed: int, arguments: argparse.Namespace) -> None:
    output = _directory(recipe, seed, arguments)
    algorithm, *overrides = recipe.split(":")
    if (output / "summary.json").exists():
        return
    command = [
        *(sys.executable, "-m", "fastgrpo.train", f"algorithm={algorithm}", f"seed={seed}", f"name={output.name}"),
        *(f"output={output}", "resume=true", f"train.max_minutes={arguments.minutes}", "train.iterations=100000"),
        *(f"runtime.threads={arguments.threads}", "checkpoint.keep=1"),
        f"evaluate.images_per_prompt={arguments.images_per_prompt}",
        *arguments.overrides,
        *overrides,
    ]
    output.mkdir(parents=True, exist_ok=True)
    with open(output / "log.txt", "w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)


def _directory(recipe: str, seed: int, arguments: argparse.Namespace) -> Path:
    directory: Path = arguments.out / f"{re.sub('[^a-z0-9_.]+', '-', recipe)}_{seed}"
    return directory


def _curve(output: Path) -> dict[str, Any]:
    rows = read_rows(output / "metrics.jsonl")
    evaluations = [row for row in rows if row.get(METRIC) is not None]
    trained = [row for row in rows if "reward/total" in row]
    stages = ("encode", "search", "rollout", "reward", "update")
    return {
        "seconds": [row["seconds"] for row in evaluations],
        "accuracy": [row[METRIC] for row in evaluations],
        "graded": [row["eval/shapes"] for row in evaluations],
        "iterations": trained[-1]["iteration"],
        "images": trained[-1]["images"],
        "group_std": statistics.fmean(row["reward/group_std"] for row in trained),
        "rank_correlation": _mean(trained, "search/rank_correlation"),
        "shares": {
            s: sum(r[f"seconds/{s}"] for r in trained) / sum(r["seconds/iteration"] for r in trained) for s in stages
        },
    }


def _mean(rows: list[dict[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if row.get(key) is not None]
    return statistics.fmean(values) if values else None


def _time_to_half(run: dict[str, Any]) -> str:
    """When the error was first half of what it was, on a line between two evaluations."""
    goal = (1 + run["accuracy"][0]) / 2
    points = list(zip(run["seconds"], run["accuracy"], strict=True))
    for (second, accuracy), (next_second, next_accuracy) in pairwise(points):
        if next_accuracy >= goal:
            return f"{second + (next_second - second) * (goal - accuracy) / (next_accuracy - accuracy):.0f}"
    return "-"


def _report(curves: dict[str, list[dict[str, Any]]], arguments: argparse.Namespace) -> None:
    rows = []
    for recipe, runs in curves.items():
        first, last = [run["accuracy"][0] for run in runs], [run["accuracy"][-1] for run in runs]
        correlations = [run["rank_correlation"] for run in runs if run["rank_correlation"] is not None]
        rows.append(
            [
                recipe,
                f"{statistics.fmean(first):.3f}",
                f"{statistics.fmean(last):.3f}",
                f"{min(last):.3f} to {max(last):.3f}",
                f"{(1 - statistics.fmean(last)) / (1 - statistics.fmean(first)):.2f}",
                ", ".join(_time_to_half(run) for run in runs),
                f"{statistics.fmean(run['iterations'] for run in runs):.0f}",
                f"{statistics.fmean(run['images'] for run in runs):.0f}",
                f"{statistics.fmean(run['group_std'] for run in runs):.3f}",
                f"{statistics.fmean(correlations):.2f}" if correlations else "",
            ]
        )
    header = [
        "recipe",
        "accuracy before",
        "after, mean",
        "range",
        "error left",
        "seconds to half the error, each seed",
        "iterations",
        "images",
        "group reward std",
        "rank correlation",
    ]
    body = (
        f"{arguments.minutes:g} minutes of training time a run on {arguments.threads} CPU thread(s), "
        f"{arguments.parallel} runs side by side, seeds {arguments.seeds}.  Accuracy is strict, on "
        f"{64 * arguments.images_per_prompt} images of 64 held-out prompts, plain noise, EMA weights, 10 steps.\n\n"
        + table(header, rows)
    )
    data = {"arguments": json.loads(json.dumps(vars(arguments), default=str)), "curves": curves}
    path = write_report("learning_curves", title="Learning curves of the embedded model", body=body, data=data)
    _draw(curves, RESULTS / f"{path.stem}.png")
    print(path.read_text())


def _draw(curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for index, (recipe, runs) in enumerate(curves.items()):
        for number, run in enumerate(runs):
            label = recipe if number == 0 else None
            axes.plot(run["seconds"], run["accuracy"], color=f"C{index}", label=label, linewidth=1.3, alpha=0.8)
    axes.set_xlabel("seconds of training, search included")
    axes.set_ylabel("strict accuracy on held-out prompts")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path)


if __name__ == "__main__":
    main()
