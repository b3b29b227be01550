"""``fastgrpo runs``: what stands in the directories of runs, whole or broken, in a table of 80 columns or as JSON."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from fastgrpo import cli
from fastgrpo.config import load_config
from fastgrpo.files.run_directory import RunDirectory


def make_run(path: Path, rows: list[dict[str, Any]], *words: str, age: int = 0) -> RunDirectory:
    """As a run leaves it."""
    run = RunDirectory.create(path, resume=False)
    plain: Any = OmegaConf.to_container(load_config("train", [*words, f"output={path}", "train.iterations=4"]))
    OmegaConf.save(plain, run.config)
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.utime(run.metrics, (1_000_000 - age, 1_000_000 - age))
    return run


def row(iteration: int, score: float | None = None, speed: float = 10.0) -> dict[str, Any]:
    trained = {"loss": 0.1, "images_per_second": speed, "seconds": 2.0 * iteration} if iteration else {"seconds": 0.0}
    return {"iteration": iteration, **trained, **({"eval/shapes": score} if score is not None else {})}


@pytest.fixture
def top(tmp_path: Path) -> Path:
    top = tmp_path / "outputs"
    make_run(top / "nft", [row(0, 0.4), row(1), row(2, 0.9, 20.0), row(3, speed=30.0), row(4, 0.7, 40.0)])
    stopped = make_run(top / "swept/many/flow", [row(0, 0.4), row(1), row(2)], "algorithm=flow_grpo", age=50)
    stopped.metrics.write_text(stopped.metrics.read_text() + '{"iteration": 3, "lo')
    os.utime(stopped.metrics, (999_950, 999_950))
    failed = make_run(top / "failed", [row(0), row(1)], "reward=jpeg_compressibility", age=100)
    failed.summary.write_text(json.dumps({"error": "RewardError: no answer"}))
    # what is no run, and what is one no more
    (top / "jobs/now").mkdir(parents=True)
    (top / "jobs/now/config.yaml").write_text("name: a job")
    (top / "evaluation").mkdir()
    (top / "evaluation/evaluation.json").write_text("{}")
    broken = top / "broken"
    (broken / "checkpoints").mkdir(parents=True)
    (broken / "config.yaml").write_text("{")
    (broken / "metrics.jsonl").write_text("no JSON\n")
    os.utime(broken / "metrics.jsonl", (999_800, 999_800))
    # within a run is none
    inside = top / "nft/checkpoints/step_000004"
    inside.mkdir(parents=True)
    (inside / "metrics.jsonl").write_text("")
    return top


def told(top: Path, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert cli.main(["runs", f"in={top}", "json=true"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def test_runs_are_found_at_any_depth_the_newest_first(
    top: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    found = told(top, capsys)
    assert [Path(run["run"]).relative_to(top).as_posix() for run in found] == [
        "nft",
        "swept/many/flow",
        "failed",
        "broken",
    ]
    assert [run["recipe"] for run in found] == ["nft", "flow_grpo", "nft", None]
    assert [run["model"] for run in found] == ["shapes"] * 3 + [None]
    assert [run["reward"] for run in found] == ["shapes", "shapes", "jpeg", None]
    assert [run["state"] for run in found] == ["finished", "stopped", "failed", "stopped"]
    assert [run["error"] for run in found] == [None, None, "RewardError: no answer", None]
    assert [run["iteration"] for run in found] == [4, 2, 1, 0]
    assert (found[0]["first_evaluation"], found[0]["last_evaluation"], found[0]["best_evaluation"]) == (0.4, 0.7, 0.9)
    # of the second to the fourth iteration
    assert found[0]["images_per_second"] == 30.0
    # half a line is being written, which is nothing to warn of
    assert "not whole" not in caplog.text


def test_the_table_fits_a_terminal_and_cuts_names_alone(
    top: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    long = "algorithm=smart_grpo_paper_step"
    make_run(top / ("a_name_that_is_long" * 4), [row(0, 0.25), row(4, -123.4)], long, "recipe=a_recipe_of_many_words")
    assert cli.main(["runs", f"in={top}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert all(len(line) <= 80 for line in lines)
    assert lines[0].split() == ["run", "recipe", "model", "reward", "evaluation", "img/s", "state"]
    by_state = {line.split()[-1]: line for line in lines[1:]}
    whole = next(line for line in lines if line.startswith("nft "))
    assert whole.split() == ["nft", "nft", "shapes", "shapes", ".400→.700", "30", "finished"]
    cut = next(line for line in lines if "…" in line and "long" in line)
    assert ".250→-123" in cut
    assert by_state["2"].endswith("stopped at 2")
    assert by_state["1"].endswith("failed at 1")
    assert "?" in next(line for line in lines if line.startswith("broken"))


def test_a_run_itself_may_be_named_and_an_empty_directory_says_so(
    top: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [run["run"] for run in told(top / "nft", capsys)] == [str(top / "nft")]
    assert cli.main(["runs", f"in={top / 'jobs'}"]) == 0
    assert "no runs in" in capsys.readouterr().out
    assert told(top / "jobs", capsys) == []
    assert cli.main(["runs", f"in={tmp_path / 'nowhere'}"]) == 2
    assert "is not a directory" in capsys.readouterr().err
