"""How a run stands, by its files alone, and its evaluations compared."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgrpo.files.run_directory import RunDirectory
from fastgrpo.records.closing import closing_words
from fastgrpo.records.evaluations import best, differences, means_of_prompts, total, totals
from fastgrpo.records.state import FAILED, FINISHED, RUNNING, STOPPED, median_speed, reached, state_of
from fastgrpo.records.summary import summarize

CONFIG: dict[str, Any] = {
    "name": "mine",
    "recipe": "nft",
    "seed": 7,
    "train": {"iterations": 10, "max_minutes": float("inf")},
    "reward": {"weights": {"a": 2.0, "b": -1.0}},
}
HOLD = "import sys; from fastgrpo.files.run_directory import RunDirectory; "
HOLD += "run = RunDirectory.create(sys.argv[1], resume=True); print('holds it', flush=True); sys.stdin.read()"


def rows(*scores: tuple[int, float, float]) -> list[dict[str, Any]]:
    return [{"iteration": n, "seconds": 6.0 * n, "eval/a": a, "eval/b": b} for n, a, b in scores]


@pytest.mark.parametrize(
    ("last", "training", "state"),
    [
        ({"iteration": 10, "seconds": 5.0}, {}, FINISHED),
        ({"iteration": 9, "seconds": 5.0}, {}, STOPPED),
        # after two minutes
        ({"iteration": 9, "seconds": 120.0}, {"max_minutes": 2.0}, FINISHED),
        ({"iteration": 9, "seconds": 119.0}, {"max_minutes": 2.0}, STOPPED),
    ],
)
def test_a_run_is_finished_where_its_config_ends_it(last: dict[str, Any], training: dict[str, Any], state: str) -> None:
    assert reached(CONFIG | {"train": CONFIG["train"] | training}, [{"iteration": 0}, last]) == state


def test_a_run_without_rows_or_config_is_not_finished() -> None:
    assert reached(CONFIG, []) == reached({}, [{"iteration": 3}]) == STOPPED


def test_a_run_is_running_while_a_process_holds_it_and_asking_does_not_take_it(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdin=-1, stdout=-1) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"holds it\n"
        assert state_of(tmp_path, CONFIG, [])[0] == RUNNING
        process.communicate(b"")
    assert state_of(tmp_path, CONFIG, [])[0] == STOPPED
    # it can be had at once
    RunDirectory.create(tmp_path, resume=True)


def test_a_run_has_failed_by_its_summary_or_by_the_batch_that_it_left(tmp_path: Path) -> None:
    summary = tmp_path / "summary.json"
    summary.write_text(json.dumps({"error": "RewardError: no answer"}))
    assert state_of(tmp_path, CONFIG, rows((10, 1, 1))) == (FAILED, "RewardError: no answer")
    for text in ("{half", "[]", '{"error": null}'):
        summary.write_text(text)
        assert state_of(tmp_path, CONFIG, rows((10, 1, 1))) == (FINISHED, None)
    (tmp_path / "metrics.jsonl").write_text("")
    batch = tmp_path / "failed_batch.safetensors"
    batch.write_text("")
    assert state_of(tmp_path, CONFIG, []) == (FAILED, f"its samples are in {batch}")


def test_speed_is_that_of_iterations_that_compiled_nothing() -> None:
    seen = [{"iteration": n, "images_per_second": speed, "compilations": c} for n, speed, c in
            ((1, 1.0, 0), (2, 2.0, 3), (3, 30.0, 0), (4, 50.0, 0), (5, 40.0, 0))]  # fmt: skip
    assert median_speed(seen) == 40.0
    assert median_speed(seen[:1]) == 1.0
    assert median_speed([{"iteration": 1}]) is None


def test_the_best_evaluation_is_that_of_the_largest_weighted_sum() -> None:
    weights = CONFIG["reward"]["weights"]
    seen = [*rows((0, 0.1, 0.0), (2, 0.9, 1.5), (4, 0.8, 0.1), (6, 0.8, 0.1)), {"iteration": 8, "eval/a": None}]
    assert [total(row, weights) for row in seen[:3]] == pytest.approx([0.2, 0.3, 1.5])
    assert total(seen[-1], weights) is None
    assert (best(seen, weights) or {})["iteration"] == 4
    assert best(seen, {}) is None
    assert totals({"a": [1.0, 2.0], "b": [0.5, 0.0], "c": [9.0, 9.0]}, weights) == [1.5, 4.0]
    assert totals({"a": [1.0]}, weights) is None
    assert totals({"a": [1.0], "b": [float("nan")]}, weights) is None


def test_the_error_of_a_difference_is_that_of_prompts_which_are_compared_with_themselves() -> None:
    """Three prompts of two images; differences are 1, 2 and 3, of mean 2 and std 1."""
    before = means_of_prompts(0, {"a": torch.tensor([[0.0, 2.0], [10.0, 10.0], [5.0, 7.0]])})
    after = means_of_prompts(4, {"a": torch.tensor([[2.0, 2.0], [12.0, 12.0], [9.0, 9.0]])})
    assert before == {"iteration": 0, "means": {"a": [1.0, 10.0, 6.0]}}
    expected = {"difference": 2.0, "standard_error": 1 / 3**0.5, "rose": 3, "fell": 0}
    assert differences([before, {"iteration": 2, "means": {}}, after]) == {"a": pytest.approx(expected)}
    assert differences([after, before])["a"]["fell"] == 3
    assert differences([before]) == {}
    assert differences([before, {"iteration": 4, "means": {"a": [1.0]}}]) == {}


def test_the_summary_has_what_was_asked_for_and_what_came_of_it(tmp_path: Path) -> None:
    seen = rows((0, 0.1, 0.0), (5, 0.9, 0.0), (10, 0.5, 0.0))
    lines = [
        {"iteration": n, "means": {"a": [a, a + d], "b": [0.0, 0.0]}} for n, a, d in ((0, 0.0, 0.2), (10, 0.4, 0.4))
    ]
    summary = summarize(seen, config=CONFIG, evaluations=lines)
    kept = [summary[key] for key in ("name", "recipe", "seed", "state", "error")]
    assert kept == ["mine", "nft", 7, FINISHED, None]
    assert summary["best_evaluation"]["iteration"] == 5
    assert summary["differences"]["a"]["difference"] == pytest.approx(0.5)
    # evaluations that an earlier version did not keep
    later = [line | {"iteration": n} for n, line in ((5, lines[0]), (10, lines[1]))]
    assert summarize(seen, config=CONFIG, evaluations=later)["differences"] == {}
    failed = summarize(seen, config=CONFIG, error="RewardError: no answer")
    assert (failed["state"], failed["error"]) == (FAILED, "RewardError: no answer")
    run = RunDirectory(tmp_path)
    run.curves.write_text("")
    said = closing_words(summary, run)
    assert said[1] == "  a  0.100 -> 0.500  +0.400 ± 0.100, 2 prompts up, 0 down"
    assert said[3] == "best evaluation: iteration 5, a 0.900, b 0.000, no longer saved"
    assert said[4:] == ["open:", f"  {run.curves}  how it went"]
    (run.checkpoints / "step_000005").mkdir(parents=True)
    assert closing_words(summary, run)[3].endswith(f"in {run.checkpoints / 'step_000005'}")
    assert "the last evaluation is the best one" in closing_words(summarize(seen[:2], config=CONFIG), run)
    # only one evaluation, or none: nothing to compare
    assert closing_words(summarize(seen[:1]), run) == ["open:", f"  {run.curves}  how it went"]
