"""What the README's first command does: ``fastgrpo train`` as it is, timed from outside, with several seeds.

    python -m benchmarks.default_run --seeds 42 43 44

One result of all seeds, with the images before and after of the one whose accuracy is the median.  Overrides of the
config go before ``--seeds``.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.report import table, write_report
from fastgrpo.files.run_directory import RunDirectory
from fastgrpo.records.json_lines import read_rows

STAGES = ("encode", "search", "rollout", "reward", "update")
_METRIC = "eval/shapes_strict"
# of which a run has one
_DEVIATIONS = ("ratio_deviation", "velocity_deviation")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One seed: seconds of the whole command, of all evaluations, and of each stage over all iterations."""

    seed: int
    wall_seconds: float
    evaluate_seconds: float
    seconds: dict[str, float]
    images: int
    iterations: int
    max_deviation: float
    evaluations: list[dict[str, float]]

    @property
    def before(self) -> float:
        return self.evaluations[0][_METRIC]

    @property
    def after(self) -> float:
        return self.evaluations[-1][_METRIC]

    @property
    def training_seconds(self) -> float:
        return self.evaluations[-1]["seconds"]

    def share(self, stage: str) -> float:
        return self.seconds[stage] / self.seconds["iteration"]

    @property
    def outside_stages(self) -> float:
        return 1 - sum(self.share(stage) for stage in STAGES)

    @property
    def outside_everything(self) -> float:
        inside = self.seconds["iteration"] + self.seconds["checkpoint"] + self.evaluate_seconds
        return 1 - inside / self.wall_seconds


def main(arguments_of_shell: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="key=value for every run")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42])
    parser.add_argument("--out", type=Path, default=Path("outputs/default_run"), help="of new run directories")
    arguments = parser.parse_args(arguments_of_shell)
    runs = [train(seed, arguments.out / f"seed_{seed}", arguments.overrides) for seed in arguments.seeds]
    shown = median_run(runs)
    body = "\n\n".join([_sentence(runs, shown), table(_header(runs), _facts(runs))])
    data = {"runs": [asdict(run) for run in runs], "after": _range([run.after for run in runs])}
    path = write_report("default_run", title="fastgrpo train, as it is", body=body, data=data)
    picture = RunDirectory(arguments.out / f"seed_{shown.seed}").images / "before_after.png"
    shutil.copy(picture, path.with_name(f"{path.stem}_{picture.name}"))
    print(path.read_text())


def train(seed: int, output: Path, overrides: Sequence[str]) -> Run:
    """Run the command, in a process of its own, and read what it wrote."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "fastgrpo", "train", f"output={output}", f"seed={seed}", *overrides]
    subprocess.run(command, check=True)
    return read_run(seed, output, time.perf_counter() - start)


def read_run(seed: int, output: Path, wall_seconds: float) -> Run:
    """What the metrics of a finished run say."""
    rows = read_rows(RunDirectory(output).metrics)
    trained = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if _METRIC in row]
    return Run(
        seed=seed,
        wall_seconds=wall_seconds,
        evaluate_seconds=sum(row["seconds/evaluate"] for row in evaluations),
        seconds={key: sum(row[f"seconds/{key}"] for row in trained) for key in (*STAGES, "iteration", "checkpoint")},
        images=trained[-1]["images"],
        iterations=len(trained),
        max_deviation=max(row[key] for row in trained for key in _DEVIATIONS if key in row),
        evaluations=[{key: row[key] for key in ("seconds", "eval/shapes", _METRIC)} for row in evaluations],
    )


def median_run(runs: Sequence[Run]) -> Run:
    """The one in the middle of the accuracies that were reached; of two in the middle the lower."""
    return sorted(runs, key=lambda run: run.after)[(len(runs) - 1) // 2]


def _range(values: Sequence[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "lowest": min(values), "highest": max(values)}


def _sentence(runs: Sequence[Run], shown: Run) -> str:
    before, after = statistics.fmean(run.before for run in runs), _range([run.after for run in runs])
    rises = f"Strict accuracy on held-out prompts rises from {before:.3f} to {after['mean']:.3f}"
    if len(runs) == 1:
        return f"{rises} with seed {shown.seed}."
    return (
        f"{rises}, the mean of seeds {', '.join(str(run.seed) for run in runs)}, which end between "
        f"{after['lowest']:.3f} and {after['highest']:.3f}.  The images are of seed {shown.seed}, the median."
    )


def _header(runs: Sequence[Run]) -> list[str]:
    return ["what", *(f"seed {run.seed}" for run in runs), "mean", "range"]


def _facts(runs: Sequence[Run]) -> list[list[str]]:
    def row(what: str, value: Callable[[Run], float], form: str) -> list[str]:
        values = [value(run) for run in runs]
        mean, lowest, highest = (format(one, form) for one in _range(values).values())
        return [what, *(format(one, form) for one in values), mean, f"{lowest} to {highest}"]

    def error_left(run: Run) -> float:
        return (1 - run.after) / (1 - run.before)

    def share_of(stage: str) -> Callable[[Run], float]:
        return lambda run: run.share(stage)

    return [
        row("strict accuracy before", lambda run: run.before, ".3f"),
        row("strict accuracy after", lambda run: run.after, ".3f"),
        row("share of the error that is left", error_left, ".2f"),
        row("iterations", lambda run: run.iterations, ".0f"),
        row("images", lambda run: run.images, ".0f"),
        row("seconds of training", lambda run: run.training_seconds, ".0f"),
        row("seconds of the whole command", lambda run: run.wall_seconds, ".0f"),
        row("seconds of its evaluations", lambda run: run.evaluate_seconds, ".0f"),
        *(row(f"share of an iteration: {stage}", share_of(stage), ".0%") for stage in STAGES),
        row("outside of these stages", lambda run: run.outside_stages, ".1%"),
        row("start, end, logs and all else of the whole command", lambda run: run.outside_everything, ".1%"),
        row("largest deviation of rollout and update", lambda run: run.max_deviation, ".1e"),
    ]


if __name__ == "__main__":
    main()
