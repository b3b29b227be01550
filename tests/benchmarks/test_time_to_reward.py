"""The benchmark of time to reward: its figures by hand, how it tunes, and how it goes on where it was stopped."""

import json
import math
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks import apart
from benchmarks.time_to_reward import __main__ as command
from benchmarks.time_to_reward import run as runs
from benchmarks.time_to_reward.curve import LEVELS, Curve, Point, median
from benchmarks.time_to_reward.figure import draw
from benchmarks.time_to_reward.learner import NUM_IMAGES, halves
from benchmarks.time_to_reward.measure import Plan, chosen
from benchmarks.time_to_reward.results import Results
from benchmarks.time_to_reward.sides import SIDES
from fastgrpo.evaluation import EvaluationResult


def curve(*accuracies: float, side: str = "nft", rate: float = 1e-3, every: float = 20, tuning: Any = None) -> Curve:
    """Evaluations ``every`` seconds, at 10 images a second."""
    tuning = tuning or accuracies
    points = [
        Point(
            seconds=every * i,
            images=int(10 * every * i),
            tuning=tuning[i],
            reported=accuracies[i],
            graded=0.9,
            reward=0.5 + 0.1 * i if i else math.nan,
        )
        for i in range(len(accuracies))
    ]
    return Curve(side=side, settings=repr(SIDES[side]), learning_rate=rate, seed=0, points=tuple(points))


def test_a_level_is_passed_on_the_line_between_two_evaluations_and_the_first_time_counts() -> None:
    run = curve(0.4, 0.6, 0.5, 0.9)
    assert run.seconds_to(0.4) == 0
    assert run.seconds_to(0.45) == pytest.approx(5)
    assert run.images_to(0.45) == pytest.approx(50)
    assert run.seconds_to(0.6) == pytest.approx(20)
    # a fall to .5, then .4 more in 20 seconds
    assert run.seconds_to(0.8) == pytest.approx(40 + 15)
    assert run.seconds_to(0.91) == math.inf
    assert run.images_to(0.91) == math.inf
    assert [run.accuracy_at(second) for second in (0, 10, 30, 60, 100)] == pytest.approx([0.4, 0.5, 0.55, 0.9, 0.9])
    assert run.images_per_second == 10
    assert LEVELS == (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9)


def test_a_median_counts_the_seeds_that_never_came_there() -> None:
    assert median([3.0, 1.0, 2.0]) == 2
    assert median([4.0, 1.0, 2.0, 3.0]) == 2.5
    assert median([1.0, math.inf, 2.0]) == 2
    assert median([1.0, math.inf, math.inf]) == math.inf


def test_a_curve_survives_json_and_its_first_reward_is_no_number() -> None:
    run = curve(0.4, 0.6)
    text = json.dumps(run.to_dict(), allow_nan=False)
    back = Curve.of_dict(json.loads(text))
    assert math.isnan(back.points[0].reward)
    assert back.points[1] == run.points[1]
    assert (back.side, back.learning_rate, back.final) == ("nft", 1e-3, 0.6)


def test_halves_take_one_of_each_two_neighbors() -> None:
    tuning, reported = halves(64)
    assert sorted(tuning + reported) == list(range(64))
    assert [place // 2 for place in tuning] == [place // 2 for place in reported] == list(range(32))
    # neither all of the even places nor all of the odd ones, which alternate in kind
    assert 8 < sum(place % 2 for place in tuning) < 24


def test_a_learning_rate_is_chosen_on_the_tuning_half_in_the_later_half_of_the_run() -> None:
    early = curve(0.9, 0.9, 0.9, rate=1e-3, tuning=(0.4, 0.7, 0.5))
    late = curve(0.1, 0.1, 0.1, rate=3e-3, tuning=(0.4, 0.6, 0.7))
    assert early.tuned_by == pytest.approx(0.6)
    assert late.tuned_by == pytest.approx(0.65)
    assert chosen([early, late]) == 3e-3
    equal = curve(0.1, 0.1, 0.1, rate=1e-4, tuning=(0.0, 0.6, 0.7))
    assert chosen([late, equal]) == 1e-4


def plan(out: Path, **others: Any) -> Plan:
    values: dict[str, Any] = {
        "sides": ["nft", "awm"],
        "seeds": [0, 1],
        "seconds": 60,
        "tune_seconds": 20,
        "every": 20,
        "out": out,
    }
    return Plan(**values | others)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the runs that are made, by a process that only writes: 3e-4 is best for awm, 3e-3 for nft."""
    names: list[str] = []

    def run(command: Sequence[str], **_: Any) -> subprocess.CompletedProcess[str]:
        given = dict(zip(command[3::2], command[4::2], strict=True))
        rate, side = float(given["--learning-rate"]), given["--side"]
        accuracy = 0.5 + (100 if side == "nft" else -100) * rate
        result = curve(0.4, accuracy, side=side, rate=rate, every=float(given["--seconds"]))
        Path(given["--out"]).write_text(json.dumps(result.to_dict()))
        names.append(f"{side} {rate:g} {given['--seed']} {given['--seconds']}")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(apart.subprocess, "run", run)
    return names


def test_a_measurement_tunes_each_side_then_runs_all_sides_seed_by_seed(made: list[str], tmp_path: Path) -> None:
    tuned, reported = plan(tmp_path)()
    assert made[:6] == [f"{side} {rate} 1000 20" for side in ("nft", "awm") for rate in ("0.0003", "0.001", "0.003")]
    assert made[6:] == ["nft 0.003 0 60", "awm 0.0003 0 60", "nft 0.003 1 60", "awm 0.0003 1 60"]
    assert {side: len(curves) for side, curves in tuned.items()} == {"nft": 3, "awm": 3}
    assert {side: len(curves) for side, curves in reported.items()} == {"nft": 2, "awm": 2}


def test_a_stopped_measurement_goes_on_where_it_stopped(made: list[str], tmp_path: Path) -> None:
    first = plan(tmp_path)()
    made.clear()
    again = plan(tmp_path)()
    assert made == []
    assert repr(again) == repr(first)
    next(tmp_path.glob("awm_lr0.0003_seed1_60s*.json")).unlink()
    plan(tmp_path, seeds=[0, 1, 2])()
    assert made == ["awm 0.0003 1 60", "nft 0.003 2 60", "awm 0.0003 2 60"]


def test_a_run_of_other_settings_is_refused(made: list[str], tmp_path: Path) -> None:
    plan(tmp_path)()
    path = next(tmp_path.glob("nft_lr0.001_*.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"settings": "another side"}))
    with pytest.raises(ValueError, match="was made by another side, and nft is now another; remove it"):
        plan(tmp_path)()


def test_a_run_that_fails_names_its_log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(apart.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
    with pytest.raises(RuntimeError, match=r"nft_lr0\.0003_seed1000_20s failed; see .*\.log"):
        plan(tmp_path)()


def test_plans_and_sides_that_cannot_be_measured_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seed 1000 chooses learning rates and is not reported"):
        plan(tmp_path, seeds=[1000])
    with pytest.raises(ValueError, match="at least one side"):
        plan(tmp_path, sides=[])
    with pytest.raises(ValueError, match=r"--seconds 0, .* must be positive"):
        plan(tmp_path, seconds=0)
    with pytest.raises(ValueError, match="no side 'ppo'"):
        command.main(["--sides", "ppo"])
    with pytest.raises(ValueError, match="flow_grpo_code needs --checkout"):
        command.main(["--sides", "flow_grpo_code"])
    with pytest.raises(ValueError, match="no checkout of DiffusionNFT: it lacks scripts/train_nft_sd3"):
        command.main(["--nft-checkout", str(tmp_path)])


def results() -> Results:
    curves = {
        "flow_grpo_code": [curve(0.4, 0.5, 0.6, side="flow_grpo_code")] * 3,
        "flow_grpo_code_no_kl": [curve(0.4, 0.5, 0.58, side="flow_grpo_code_no_kl")] * 3,
        # to .6: 10, 20 and never
        "nft": [curve(0.4, 0.8, 0.8), curve(0.4, 0.6, 0.8), curve(0.4, 0.5, 0.5)],
    }
    return Results(curves=curves, tuned={"nft": [curve(0.4, 0.6, rate=3e-4), curve(0.4, 0.7, rate=1e-3)]})


def test_sides_are_set_beside_the_best_of_flow_grpos_own_code_by_hand() -> None:
    found = results()
    assert found.baseline == "flow_grpo_code"
    assert found.final("flow_grpo_code") == pytest.approx(0.6)
    assert found.seconds_to("nft", 0.6) == [pytest.approx(10), pytest.approx(20), math.inf]
    # 40 seconds of theirs, median 20 of ours
    assert found.times_sooner("nft", 0.6) == pytest.approx(2)
    assert found.times_sooner("flow_grpo_code", 0.6) == pytest.approx(1)
    # theirs never comes there
    assert found.times_sooner("nft", 0.65) == math.inf
    assert found.times_sooner("flow_grpo_code", 0.65) is None
    assert Results(curves={"nft": found.curves["nft"]}, tuned={}).baseline is None


def test_tables_say_medians_ranges_and_how_many_seeds_came_there() -> None:
    text = results().summary()
    assert "## Times sooner than flow_grpo_code\n" in text
    seconds = text.split("## Seconds of training to an accuracy")[1].split("## Images")[0]
    row = next(line for line in seconds.splitlines() if line.startswith("| nft "))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    # the slowest is at .5 after 20 seconds; at .6 it never is
    assert cells[1] == "10 (5 to 20)"
    assert cells[3] == "20 (10 to -), 2 of 3 seeds"
    assert cells[8] == "-"
    (side,) = [line for line in text.split("## Seconds")[0].splitlines() if line.startswith("| nft ")]
    # the rise: .7 of the last interval less .6 of the first
    assert "| 0.001 | 10.0 | 0.400 | 0.700 | 0.500 to 0.800 | +0.100 | 20 (10 to -), 2 of 3 seeds | 2.00 |" in side
    (theirs,) = [line for line in text.split("## Seconds")[0].splitlines() if line.startswith("| flow_grpo_code |")]
    assert theirs.endswith("| 40 (40 to 40) | 1.00 |")
    images = text.split("## Images to an accuracy")[1].split("## Times")[0]
    assert "| nft | 100 (50 to 200) |" in images
    tuning = text.split("## Tuning")[1]
    assert "| side | 0.0003 | 0.001 |" in tuning
    assert "| nft | 0.600 | 0.700 |" in tuning


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    draw(results().curves, tmp_path / "curves.png", axis="seconds")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size == (1320, 720)
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 50


class Counting:
    """A learner whose iterations take 7 seconds, and whose accuracy tells how many there were."""

    def __init__(self) -> None:
        self.steps = 0
        self.seconds = 0.0

    def step(self) -> float:
        self.steps += 1
        self.seconds += 7
        return self.steps / 10

    def evaluate(self) -> EvaluationResult:
        # takes time that is not training
        self.seconds += 1000
        tuning, _ = halves(4)
        strict = torch.zeros(4, 2)
        strict[tuning] = self.steps / 100
        means = {"shapes": 0.25, "shapes_strict": strict.mean().item()}
        return EvaluationResult({"shapes_strict": strict}, means, 8, [], [], None)


def test_a_run_is_evaluated_every_so_many_seconds_of_training_and_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = Counting()
    monkeypatch.setattr(runs, "_seconds", lambda: learner.seconds)
    points = runs.trained(learner, seconds=40, every=20)
    # three iterations pass 20 seconds, three more pass 40, where it ends
    assert [point.seconds for point in points] == [0, 21, 42]
    assert [point.images for point in points] == [0, 3 * NUM_IMAGES, 6 * NUM_IMAGES]
    assert [point.tuning for point in points] == pytest.approx([0, 0.03, 0.06])
    assert [point.reported for point in points] == [0, 0, 0]
    assert [point.reward for point in points[1:]] == pytest.approx([0.2, 0.5])
    assert math.isnan(points[0].reward)
    # the end is evaluated, though 20 seconds have not passed
    learner = Counting()
    assert [point.seconds for point in runs.trained(learner, seconds=25, every=20)] == [0, 21, 28]
