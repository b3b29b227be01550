"""``benchmarks.default_run``: several seeds are one result, with the images of the one in the middle."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import default_run, report
from benchmarks.default_run import STAGES, Run, main, median_run

# of each seed what it reached
AFTER = {42: 0.6, 43: 0.9, 44: 0.75}


def write_run(command: list[str], check: bool) -> None:
    """In place of ``fastgrpo train``: two iterations of 2 s, and evaluations of 1 s before and after."""
    given = dict(argument.split("=") for argument in command if "=" in argument)
    output, seed = Path(given["output"]), int(given["seed"])
    (output / "images").mkdir(parents=True)
    (output / "images" / "before_after.png").write_text(f"seed {seed}")
    stages = {f"seconds/{stage}": seconds for stage, seconds in zip(STAGES, (0.0, 0.2, 1.0, 0.2, 0.5), strict=True)}
    trained = {"loss": 0.1, "seconds/iteration": 2.0, "seconds/checkpoint": 0.5, "ratio_deviation": 0.0, **stages}
    evaluated = {"seconds/evaluate": 1.0, "eval/shapes": 0.8}
    rows: list[dict[str, Any]] = [
        {"iteration": 0, "seconds": 0.0, "eval/shapes_strict": 0.5, **evaluated},
        {"iteration": 1, "seconds": 2.0, "images": 192, **trained},
        {"iteration": 2, "seconds": 4.0, "images": 384, "eval/shapes_strict": AFTER[seed], **evaluated, **trained},
    ]
    (output / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    clock = iter((100.0, 110.0, 200.0, 220.0, 300.0, 310.0))
    monkeypatch.setattr(default_run, "subprocess", SimpleNamespace(run=write_run))
    monkeypatch.setattr(default_run, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(report, "commit", lambda: "0123456789abcdef")
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def test_all_seeds_are_one_result_with_mean_and_range(results: Path, tmp_path: Path) -> None:
    main(["train.iterations=2", "--out", str(tmp_path / "runs"), "--seeds", "42", "43", "44"])
    (told,), (data,) = (list(results.glob(f"*.{suffix}")) for suffix in ("md", "json"))
    text = told.read_text()
    assert "rises from 0.500 to 0.750, the mean of seeds 42, 43, 44, which end between 0.600 and 0.900." in text
    assert "| what | seed 42 | seed 43 | seed 44 | mean | range |" in text
    assert "| strict accuracy after | 0.600 | 0.900 | 0.750 | 0.750 | 0.600 to 0.900 |" in text
    assert "| share of the error that is left | 0.80 | 0.20 | 0.50 | 0.50 | 0.20 to 0.80 |" in text
    assert "| images | 384 | 384 | 384 | 384 | 384 to 384 |" in text
    assert "| seconds of training | 4 | 4 | 4 | 4 | 4 to 4 |" in text
    assert "| seconds of the whole command | 10 | 20 | 10 | 13 | 10 to 20 |" in text
    assert "| share of an iteration: rollout | 50% | 50% | 50% | 50% | 50% to 50% |" in text
    # stages are 1.9 of 2 s; iterations 4, checkpoints 1 and evaluations 2 of 10 s
    assert "| outside of these stages | 5.0% | 5.0% |" in text
    assert "| start, end, logs and all else of the whole command | 30.0% | 65.0% |" in text
    found = json.loads(data.read_text())
    assert found["after"] == pytest.approx({"mean": 0.75, "lowest": 0.6, "highest": 0.9})
    assert [run["evaluations"][-1]["eval/shapes_strict"] for run in found["runs"]] == [0.6, 0.9, 0.75]


def test_the_picture_is_of_the_median_seed(results: Path, tmp_path: Path) -> None:
    main(["--out", str(tmp_path / "runs"), "--seeds", "42", "43", "44"])
    (picture,) = results.glob("*.png")
    assert picture.name.endswith("_before_after.png")
    assert picture.read_text() == "seed 44"
    assert "The images are of seed 44" in next(iter(results.glob("*.md"))).read_text()


def test_one_seed_has_no_mean(results: Path, tmp_path: Path) -> None:
    main(["--out", str(tmp_path / "runs"), "--seeds", "43"])
    text = next(iter(results.glob("*.md"))).read_text()
    assert "Strict accuracy on held-out prompts rises from 0.500 to 0.900 with seed 43." in text


def test_of_two_seeds_in_the_middle_the_lower_is_shown() -> None:
    def run(after: float) -> Run:
        evaluations = [{"eval/shapes_strict": after}]
        values: dict[str, Any] = {"wall_seconds": 1, "evaluate_seconds": 1, "seconds": {}, "images": 1, "iterations": 1}
        return Run(seed=round(100 * after), max_deviation=0, evaluations=evaluations, **values)

    assert median_run([run(0.7), run(0.5), run(0.9), run(0.6)]).seed == 60
