"""A run makes its report at its end, however it ends, and never fails by it."""

import json
import signal
import sys
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest

from fastgrpo.assembly import build_trainer
from fastgrpo.distributed.world import World
from fastgrpo.health import Preempted
from fastgrpo.rewards.ranks import PolicyRank
from fastgrpo.trainer import Trainer
from fastgrpo.training import train
from tests.ranks import Ranks, ranks_of_module
from tests.report.made_run import evaluation_of, make_record, searched
from tests.report.read_page import Page
from tests.tiny_config import TEXTS, make_config

on_ranks = ranks_of_module()

SEARCH = (
    "algorithm/noise=elite",
    "algorithm.noise.rounds=2",
    "algorithm.noise.candidates=4",
    "algorithm.noise.elites=2",
    "algorithm.noise.estimate_steps=1",
)


def test_training_with_a_search_ends_with_a_page_of_what_it_saw(tiny_weights: Path, tmp_path: Path) -> None:
    words = (*SEARCH, "train.iterations=3", "evaluate.every=2", "report=true")
    run = train(make_config(tiny_weights, tmp_path / "run", *words))
    page = Page(run / "report.html")
    assert page.data["gallery"]["steps"] == [0, 2, 3]
    assert [text for text in page.all_of("figcaption") if text in TEXTS] == list(TEXTS)
    assert "Not at the end" not in page.text
    rows = {row["iteration"]: row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}
    searches = [json.loads(line) for line in (run / "search.jsonl").read_text().splitlines()]
    # the first one after each evaluation
    assert [row["iteration"] for row in searches] == [1, 3]
    for search in searches:
        row, groups = rows[search["iteration"]], search["groups"]
        assert len(groups) == 2
        assert all(group["prompt"] in TEXTS for group in groups)
        # the groups are all of the iteration, so that its metrics are theirs
        assert fmean(value for group in groups for value in group["rewards"]) == pytest.approx(
            row["reward/total"], rel=1e-4
        )
        best_of_last = [sorted(group["rounds"][1], reverse=True)[:2] for group in groups]
        gains = [fmean(best) - fmean(group["rounds"][0]) for best, group in zip(best_of_last, groups, strict=True)]
        assert fmean(gains) == pytest.approx(row["search/gain"], rel=1e-3, abs=1e-4)
        for group in groups:
            assert [len(scores) for scores in group["rounds"]] == [4, 4]
            seen = sorted(group["rounds"][0] + group["rounds"][1], reverse=True)
            assert group["chosen"] == seen[:3]


def run_of_ranks(world: World, weights: Path, output: Path) -> int:
    words = ("train.iterations=2", "evaluate.every=1", "report=true")
    trainer = build_trainer(make_config(weights, output, *words), PolicyRank(world=world))
    trainer.run()
    return trainer.iteration


def test_several_ranks_make_one_page_of_all_their_images(on_ranks: Ranks, tiny_weights: Path, tmp_path: Path) -> None:
    assert on_ranks(2, run_of_ranks, tiny_weights, tmp_path / "run") == [2, 2]
    page = Page(tmp_path / "run" / "report.html")
    assert page.data["gallery"]["steps"] == [0, 1, 2]
    assert [text for text in page.all_of("figcaption") if text in TEXTS] == list(TEXTS)
    assert "Not at the end" not in page.text


def test_a_run_that_is_interrupted_has_a_page_too(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.step

    def interrupted(self: Trainer) -> dict[str, float]:
        signal.raise_signal(signal.SIGTERM)
        return step(self)

    monkeypatch.setattr(Trainer, "step", interrupted)
    with pytest.raises(Preempted):
        train(make_config(tiny_weights, tmp_path / "run", "train.iterations=9", "report=true"))
    page = Page(tmp_path / "run" / "report.html")
    assert "Not at the end" in page.text
    assert "1 of 9" in page.all_of("span")


def test_a_run_whose_report_fails_says_so_in_a_line_and_is_done(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(directories: Any) -> Path:
        raise RuntimeError("no\nfonts")

    monkeypatch.setattr("fastgrpo.report.page.write_report", fail)
    run = train(make_config(tiny_weights, tmp_path / "run", "train.iterations=1", "report=true"))
    said = f"no report was made (RuntimeError: no fonts); fastgrpo report run={run} tries again"
    assert said in capsys.readouterr().out.splitlines()
    assert (run / "summary.json").is_file()
    assert not (run / "report.html").exists()


def test_wandb_gets_the_page_that_a_run_ends_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[dict[str, Any], int]] = []
    logger = SimpleNamespace(log=lambda values, step: logged.append((values, step)), finish=lambda: None)
    wandb = SimpleNamespace(init=lambda **_: logger, Image=lambda image: image, Html=lambda file, inject: file.read())
    monkeypatch.setitem(sys.modules, "wandb", wandb)

    def make(directory: Path) -> Path:
        # last, when what it shows is written
        assert (directory / "summary.json").is_file()
        (directory / "report.html").write_text("the page")
        return directory / "report.html"

    record = make_record(tmp_path / "run", make_report=make, wandb_project="shapes")
    record.evaluation(0, evaluation_of(0, ["a red circle"]))
    record.metrics.log(0, {"eval/shapes": 0.5})
    record.metrics.log(3, {"loss": 0.5})
    record.finish()
    assert [(*values, step) for values, step in logged[:2]] == [("evaluation", 0), ("before_after", 0)]
    assert logged[-1] == ({"report": "the page"}, 3)


def test_a_resumed_run_drops_the_searches_that_it_makes_again(tmp_path: Path) -> None:
    record = make_record(tmp_path / "run")
    for iteration in (1, 5, 9):
        record.search(iteration, ["a", "b"], *searched(2))
    record.truncate_to(4, 5)
    found = [json.loads(line)["iteration"] for line in record.directory.search.read_text().splitlines()]
    assert found == [1, 5]
