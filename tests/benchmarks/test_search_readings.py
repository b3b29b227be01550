"""The benchmark of the two readings of Smart-GRPO: its sides can be run, and its table says what they found."""

import json
import math
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from benchmarks import search_readings
from benchmarks.search_readings import SIDES, whole
from benchmarks.time_to_reward.curve import Curve, Point
from fastgrpo.algorithm.search import EliteSearch
from fastgrpo.algorithm.step_search import StepSearch
from fastgrpo.config import load_config
from fastgrpo.parts import RunParts

SETTINGS = {"seconds": 20.0, "every": 10.0, "learning_rate": 1e-3}


def point(seconds: float, accuracy: float) -> Point:
    return Point(seconds=seconds, images=int(10 * seconds), tuning=accuracy, reported=accuracy, graded=0.8, reward=0.7)


def cell(side: str, end: float, **means: float) -> dict:
    settings = " ".join(SIDES[side])
    points = (point(0, 0.4), point(20, end))
    curve = Curve(side=side, settings=settings, learning_rate=1e-3, seed=0, points=points)
    return {"curve": curve.to_dict(), "means": {"seconds/iteration": 4.0, "seconds/search": 1.0, **means}}


@pytest.mark.parametrize("side", SIDES)
def test_each_side_is_a_run_that_passes_every_check(side: str, tmp_path: Path) -> None:
    words = ("train.group_size=16", f"output={tmp_path / 'run'}", *SIDES[side])
    noise = RunParts.read(load_config("train", list(words))).algorithm.noise
    # named by what it searches, and by what becomes of the noise that was chosen
    assert isinstance(noise, StepSearch) == ("step" in side)
    assert isinstance(noise, EliteSearch) == (side == "start_paper")
    if isinstance(noise, StepSearch):
        expected = {"none": "none", "paper": "none", "weights": "weights", "imitate": "imitate"}
        assert noise.correction == expected[side.rpartition("_")[2]]


def test_accuracy_is_that_on_all_held_out_prompts() -> None:
    halves = Point(seconds=1.0, images=1, tuning=0.25, reported=0.75, graded=0.5, reward=0.5)
    assert (whole(halves).tuning, whole(halves).reported) == (0.5, 0.5)


def test_the_table_is_of_the_cells_that_are_there_and_what_was_not_measured_is_a_dash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.report.RESULTS", tmp_path / "results")
    monkeypatch.setenv("BENCHMARK_COMMIT", "0123456789")
    search = {"search/gain": 0.125, "search/rank_correlation": 0.5, "search/effective_share": 0.75}
    ends = {("flow_grpo", 0): 0.5, ("flow_grpo", 1): 0.6, ("step_weights", 0): 0.7, ("step_weights", 1): 0.8}
    for (side, seed), end in ends.items():
        found = cell(side, end, **(search if side == "step_weights" else {"seconds/search": 0.0}))
        (tmp_path / f"{side}_seed{seed}_20s_every10_lr0.001.json").write_text(json.dumps(found))
    arguments = ["--sides", "flow_grpo", "step_weights", "--seeds", "0", "1", "--seconds", "20", "--every", "10"]
    monkeypatch.setattr(sys, "argv", ["search_readings", *arguments, "--out", str(tmp_path)])
    monkeypatch.setattr("benchmarks.report.commit", lambda: None)
    # of the module alone: versions ask git and lscpu
    monkeypatch.setattr(search_readings, "run_apart", None)
    search_readings.main()
    text = capsys.readouterr().out
    assert "| flow_grpo | 10.0 | 0.400 | 0.550 | 0.500 to 0.600 | 0.800 | 0% | - | - | - |" in text
    assert "| step_weights | 10.0 | 0.400 | 0.750 | 0.700 to 0.800 | 0.800 | 25% | 0.12 | 0.50 | 0.75 |" in text
    assert {path.suffix for path in (tmp_path / "results").iterdir()} == {".md", ".json", ".png"}


def test_a_run_of_what_a_side_no_longer_is_is_refused(tmp_path: Path) -> None:
    found = cell("flow_grpo", 0.5)
    found["curve"]["settings"] = "algorithm=another"
    (tmp_path / "flow_grpo_seed0_20s_every10_lr0.001.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match="was made by algorithm=another, and flow_grpo is now another; remove it"):
        search_readings._made("flow_grpo", 0, Namespace(out=tmp_path, **SETTINGS))


def test_a_learner_keeps_what_its_searches_measured() -> None:
    class Trainer:
        rows = iter([{"reward/total": 0.5, "search/gain": 1.0}, {"reward/total": 0.7, "search/gain": 2.0}])

        def step(self) -> dict[str, float]:
            return {**next(self.rows), "search/rank_correlation": math.nan, "seconds/search": 3.0}

    learner = search_readings.Watched.__new__(search_readings.Watched)
    learner.trainer = Trainer()  # type: ignore[assignment]
    learner._seen = {name: [] for name in search_readings._WATCHED}
    assert [learner.step(), learner.step()] == [0.5, 0.7]
    assert learner.means == {"search/gain": 1.5, "seconds/search": 3.0}


def test_one_thread_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a cell is written whole, with the curve of its side."""

    class Learner:
        def __init__(self, run, overrides) -> None:
            self.means = {"search/gain": 0.5}
            assert overrides == SIDES["window"]
            assert (run.seed, run.learning_rate) == (3, 1e-3)

    def trained(learner: Learner, seconds: float, every: float) -> list[Point]:
        assert (torch.get_num_threads(), seconds, every) == (1, 20.0, 10.0)
        return [point(0, 0.4), point(20, 0.6)]

    monkeypatch.setattr(search_readings, "Watched", Learner)
    monkeypatch.setattr(search_readings, "trained", trained)
    search_readings._run(Namespace(sides=["window"], seeds=[3], cell=tmp_path / "cell.json", **SETTINGS))
    found = json.loads((tmp_path / "cell.json").read_text())
    assert Curve.of_dict(found["curve"]).final == 0.6
    assert found["means"] == {"search/gain": 0.5}
