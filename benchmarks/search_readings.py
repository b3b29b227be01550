"""What each reading of Smart-GRPO's search does to learning, on the embedded model at equal CPU seconds of training.

    python -m benchmarks.search_readings
    python -m benchmarks.search_readings --seconds 20 --seeds 0 --sides flow_grpo step_paper

arXiv:2510.02654 can be read as a search of start noises or of the noise within the trajectory, the key
``algorithm.noise.target``, and the latter's chosen noise can be trained as the paper has it, with weights that undo the
choice, or by imitation.  A run that is in --out is not made again: a stopped measurement goes on.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.apart import run_apart
from benchmarks.report import table, write_report
from benchmarks.time_to_reward.curve import Curve, Point
from benchmarks.time_to_reward.figure import draw
from benchmarks.time_to_reward.learner import GROUP, IMAGES_PER_PROMPT, NUM_STEPS, PROMPTS, Run
from benchmarks.time_to_reward.ours import OurLearner
from benchmarks.time_to_reward.run import trained
from fastgrpo.files.whole import write_whole

_PLAIN = "algorithm/noise=gaussian"
_STEP = "algorithm/noise=elite_step"
# as many candidates an iteration as the paper's reading scores, all drawn from the policy
_SHARED = (_STEP, "algorithm.noise.shares_start=true", "algorithm.noise.candidates=3")
# where an estimate knows something: the steps from t = .79 to .47
_LATE = ("algorithm.timesteps.low=4", "algorithm.timesteps.high=7")
SIDES: dict[str, tuple[str, ...]] = {
    "flow_grpo": ("algorithm=flow_grpo",),
    "start_paper": ("algorithm=smart_grpo_paper",),
    "step_paper": ("algorithm=smart_grpo_paper_step",),
    "step_paper_imitate": ("algorithm=smart_grpo_paper_step", "algorithm.noise.correction=imitate"),
    "step_weights": ("algorithm=smart_grpo_paper_step", *_SHARED),
    "window": ("algorithm=smart_grpo", _PLAIN),
    "window_step_none": ("algorithm=smart_grpo", _STEP, "algorithm.noise.correction=none"),
    "window_step_weights": ("algorithm=smart_grpo", _STEP),
    "window_step_imitate": ("algorithm=smart_grpo", _STEP, "algorithm.noise.correction=imitate"),
    "late_window": ("algorithm=smart_grpo", _PLAIN, *_LATE),
    "late_window_step_none": ("algorithm=smart_grpo", _STEP, "algorithm.noise.correction=none", *_LATE),
    "late_window_step_weights": ("algorithm=smart_grpo", _STEP, *_LATE),
    "late_window_step_imitate": ("algorithm=smart_grpo", _STEP, "algorithm.noise.correction=imitate", *_LATE),
}
_WATCHED = ("search/gain", "search/rank_correlation", "search/effective_share", "seconds/search", "seconds/iteration")


class Watched(OurLearner):
    """A learner that keeps what its searches measured."""

    def __init__(self, run: Run, overrides: tuple[str, ...]) -> None:
        super().__init__(run, overrides)
        self._seen: dict[str, list[float]] = {name: [] for name in _WATCHED}

    def step(self) -> float:
        metrics = self.trainer.step()
        for name, values in self._seen.items():
            if math.isfinite(value := metrics.get(name, math.nan)):
                values.append(value)
        return metrics["reward/total"]

    @property
    def means(self) -> dict[str, float]:
        """Over iterations, of what was measured."""
        return {name: statistics.fmean(values) for name, values in self._seen.items() if values}


def main() -> None:
    arguments = _parse()
    if arguments.cell:
        _run(arguments)
        return
    cells = [(side, seed) for seed in arguments.seeds for side in arguments.sides]
    arguments.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in arguments.sides}
    for side, seed in cells:
        found[side].append(_made(side, seed, arguments))
    curves = {side: [Curve.of_dict(cell["curve"]) for cell in of_side] for side, of_side in found.items()}
    body = f"{_legend(arguments)}\n\n{_table(curves, found)}"
    data = {"seconds": arguments.seconds, "learning_rate": arguments.learning_rate, "cells": found}
    path = write_report("search_readings", title="Two readings of Smart-GRPO's search", body=body, data=data)
    draw(curves, path.with_suffix(".png"), axis="CPU seconds of training, one thread")
    print(path.read_text())


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), metavar="SIDE")
    parser.add_argument("--seconds", type=float, default=120.0, help="CPU seconds of training, a run")
    parser.add_argument("--every", type=float, default=30.0, help="CPU seconds of training between evaluations")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of every side")
    parser.add_argument("--out", type=Path, default=Path("outputs/search_readings"), help="of the runs")
    parser.add_argument("--cell", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _made(side: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """A run, in a process of its own unless it is there."""
    rate = arguments.learning_rate
    path = arguments.out / f"{side}_seed{seed}_{arguments.seconds:g}s_every{arguments.every:g}_lr{rate:g}.json"
    if not path.exists():
        command = [
            *(sys.executable, "-m", "benchmarks.search_readings", "--cell", str(path), "--sides", side),
            *("--seeds", str(seed), "--seconds", str(arguments.seconds), "--every", str(arguments.every)),
            *("--learning-rate", str(rate)),
        ]
        run_apart(path.stem, command, path)
    cell: dict[str, Any] = json.loads(path.read_text())
    if cell["curve"]["settings"] != " ".join(SIDES[side]):
        raise ValueError(f"{path} was made by {cell['curve']['settings']}, and {side} is now another; remove it")
    return cell


def _run(arguments: argparse.Namespace) -> None:
    """One run; of the seconds, evaluations are left out."""
    (side,), (seed,) = arguments.sides, arguments.seeds
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        run = Run(seed=seed, learning_rate=arguments.learning_rate, scratch=Path(scratch))
        learner = Watched(run, SIDES[side])
        points = trained(learner, arguments.seconds, arguments.every)
    curve = Curve(
        side=side,
        settings=" ".join(SIDES[side]),
        learning_rate=run.learning_rate,
        seed=seed,
        points=tuple(map(whole, points)),
    )
    cell = {"curve": curve.to_dict(), "means": learner.means}
    write_whole(arguments.cell, (json.dumps(cell, indent=1) + "\n").encode())


def whole(point: Point) -> Point:
    """With the accuracy on all held-out prompts: no learning rate is chosen on half of them here."""
    accuracy = (point.tuning + point.reported) / 2
    return replace(point, tuning=accuracy, reported=accuracy)


def _legend(arguments: argparse.Namespace) -> str:
    sides = "\n".join(f"- `{side}`: `{' '.join(SIDES[side])}`" for side in arguments.sides)
    return f"""\
{arguments.seconds:g} CPU seconds of training a run, one torch thread, evaluations left out; seeds \
{", ".join(map(str, arguments.seeds))}; learning rate {arguments.learning_rate:g} for all, which was tuned for none.

The paper reports an ImageReward of .8575 for Smart-GRPO against .8237 for Flow-GRPO, on a model, reward and budget of
its own.  This is no repetition of that: compared are recipes on the embedded model, trained on the graded verifier of
shapes, by strict accuracy on held-out prompts from plain noise, with the search off, {NUM_STEPS} steps and
{IMAGES_PER_PROMPT} images a prompt.  An iteration is {PROMPTS} prompts x {GROUP} images on every side; a search costs
time, so that searched sides make fewer images in theirs.  Differences within the range over seeds say nothing.

`gain`: of the estimated reward by the search.  `correlation`: rank correlation, within a prompt, of the estimate of
what was chosen with the final reward.  `effective`: share of the weighted samples that count.  These are means over
iterations.

{sides}"""


def _table(curves: Mapping[str, Sequence[Curve]], found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    def mean(side: str, name: str) -> float:
        values = [cell["means"][name] for cell in found[side] if name in cell["means"]]
        return statistics.fmean(values) if values else math.nan

    def text(value: float) -> str:
        return f"{value:.2f}" if math.isfinite(value) else "-"

    rows = []
    for side, runs in curves.items():
        ends = [run.final for run in runs]
        share = mean(side, "seconds/search") / mean(side, "seconds/iteration")
        rows.append(
            [
                side,
                f"{statistics.fmean(run.images_per_second for run in runs):.1f}",
                f"{runs[0].points[0].reported:.3f}",
                f"{statistics.fmean(ends):.3f}",
                f"{min(ends):.3f} to {max(ends):.3f}",
                f"{statistics.fmean(run.points[-1].graded for run in runs):.3f}",
                f"{share:.0%}",
                *(text(mean(side, f"search/{name}")) for name in ("gain", "rank_correlation", "effective_share")),
            ]
        )
    header = ["side", "images/s", "accuracy before", "at the end, mean", "range", "graded reward"]
    return table([*header, "time searched", "gain", "correlation", "effective"], rows)


if __name__ == "__main__":
    main()
