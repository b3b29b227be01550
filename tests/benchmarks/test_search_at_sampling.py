"""What network evaluations buy at sampling: the whole command on few prompts, and what is made of its cells."""

import json
import shutil
import time
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.search_at_sampling import __main__ as command
from benchmarks.search_at_sampling import cells
from benchmarks.search_at_sampling.cells import Bench, Cell, Measured, plain_cells, searched_cells

SCORES = {"shapes_strict": [[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]], "shapes": [[1.0, 0.5], [1.0, 1.0], [0.25, 0.25]]}


def measured(cell: Cell) -> Measured:
    return Measured(
        cell=cell, scores=SCORES | {"clip_score": SCORES["shapes"]}, evaluations=cell.budget, scored=1, cpu_seconds=0
    )


def test_means_and_errors_by_hand() -> None:
    one = measured(Cell(policy="base", method="halving", budget=20))
    # means of prompts are 1/2, 1 and 0, of std 1/2
    assert one.mean("shapes_strict") == pytest.approx(0.5)
    assert one.error("shapes_strict") == pytest.approx(0.5 / 3**0.5)


def test_cells_have_names_of_their_own_and_comparisons_their_budget() -> None:
    all_cells = [
        *plain_cells("base"),
        *searched_cells("base", command.BUDGETS, list(cells.SEARCHES), "verifier"),
        *searched_cells("base", command.BUDGETS, list(cells.SEARCHES), "CLIP"),
    ]
    assert len({cell.name for cell in all_cells}) == len(all_cells)
    for cell in plain_cells("base"):
        assert cell.budget == cell.num_steps * (1 if cell.guidance_scale == 1 else 2)
    # plain noise is what the least budget buys
    assert {cell.budget for cell in searched_cells("base", (10, 20, 40), ["halving"], "verifier")} == {20, 40}
    assert [cell.budget for cell in searched_cells("base", (10, 20, 40), ["halving"], "CLIP")] == [20]


def test_the_command_measures_once_reports_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setenv("BENCHMARK_COMMIT", "0123456789")
    (tmp_path / "prompts.txt").write_text("a red circle\nthree green triangles\n")
    line = [f"prompts.held_out={tmp_path / 'prompts.txt'}", "runtime.device=cpu", "--budgets", "10", "20"]
    line += ["--methods", "best of N", "halving", "--hacking", "halving", "best of N"]
    line += ["--images", "2", "--out", str(tmp_path / "cells")]
    command.main(line)
    shown = capsys.readouterr().out
    assert (
        "| base: strict accuracy within | 10 evaluations | 20 evaluations | 40 evaluations | 80 evaluations |" in shown
    )
    assert "| base | halving | CLIP | 2" in shown
    assert next((tmp_path / "results").glob("search_at_sampling_*.png")).stat().st_size > 10_000
    found = json.loads(next((tmp_path / "results").glob("search_at_sampling_*.json")).read_text())["cells"]
    spent = {(one["cell"]["method"], one["cell"]["budget"]): one["evaluations"] for one in found}
    assert spent["plain noise", 10] == 10
    assert spent["guidance 2.5", 20] == spent["more steps", 20] == spent["best of N", 20] == 20
    assert 10 < spent["halving", 20] <= 20
    # what a search is given, it finds
    by = {(one["cell"]["method"], one["cell"]["searched"]): one["scores"] for one in found}
    plain, searched = by["plain noise", "verifier"], by["best of N", "verifier"]
    assert all(
        s >= p for pair in zip(searched["shapes"], plain["shapes"], strict=True) for s, p in zip(*pair, strict=True)
    )
    clip = by["best of N", "CLIP"]["clip_score"]
    assert all(s >= p for pair in zip(clip, plain["clip_score"], strict=True) for s, p in zip(*pair, strict=True))
    # an interruption loses nothing, and nothing is measured again
    monkeypatch.setattr(cells, "_evaluation", lambda *_: pytest.fail("measured again"))
    command.main(line)
    shutil.rmtree(tmp_path / "results")
    for path in (tmp_path / "cells").glob("base_*_20_by_clip.json"):
        path.unlink()
    capsys.readouterr()
    command.main([*line, "--cpu-seconds", str(time.process_time())])
    assert "| policy" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="was measured with other settings"):
        command.main([*line, "--images", "1"])


def test_a_table_has_blanks_where_nothing_was_measured() -> None:
    results = [
        measured(Cell(policy="base", method="plain noise", budget=10)),
        measured(Cell(policy="base", method="halving", budget=20)),
    ]
    lines = command.accuracy_table(results, "base").splitlines()
    assert lines[2:] == ["| plain noise | 0.500 ± 0.289 |  |", "| halving |  | 0.500 ± 0.289 |"]
    assert command.hacking(results) == []


def test_a_bench_of_no_run_has_one_policy(tmp_path: Path) -> None:
    assert Bench(directory=tmp_path, run="", images_per_prompt=1).measured(plain_cells("base")[0]) is None
