"""The page says what the run's files say, lets nothing in and asks for nothing outside."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fastgrpo import cli
from fastgrpo.overrides import gathered
from fastgrpo.report.curves import _Drawing
from fastgrpo.report.headline import headline_of
from fastgrpo.report.page import write_report
from fastgrpo.report.run import read_runs
from tests.report.made_run import CONFIG, HOSTILE, PROMPTS, make_run, rows_of
from tests.report.read_page import Page


def page_of(*runs: Path) -> Page:
    return Page(write_report(runs))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """Of a run of four iterations, which searched twice."""
    return page_of(make_run(tmp_path_factory.mktemp("runs") / "run", searches=(1, 3)))


def test_every_curve_has_the_numbers_of_metrics_jsonl(page: Page) -> None:
    rows = [json.loads(line) for line in (page.path.parent / "metrics.jsonl").read_text().splitlines()]
    metrics = {name for row in rows for name in row} - {"iteration", "images", "seconds", "nonfinite"}
    sources = page.sources()
    assert {f"{name} 0" for name in metrics} == {name for name in sources if name}
    for name in metrics:
        having = [row for row in rows if row.get(name) is not None]
        found = sources[f"{name} 0"]
        assert found["value"] == found["y"] == [row[name] for row in having]
        assert found["x"] == found["seconds"] == [row["seconds"] for row in having]
        assert found["iteration"] == [row["iteration"] for row in having]
        assert found["images"] == [row.get("images", 0) for row in having]
    assert page.all_of("em") == ["1 not finite"]


def test_the_first_screen_answers_whether_it_worked(page: Page) -> None:
    """0.4 to 0.6 by hand; the error over prompts with scores of 0, 0.1 and 0.2 is 0.1 / sqrt(3)."""
    said = page.all_of("p")[0]
    assert 2 * math.hypot(0.1 / math.sqrt(3), 0.1 / math.sqrt(3)) < 0.2
    assert said == "shapes on held-out prompts rose from 0.4 to 0.6 (+0.2)."
    big = page.all_of("span")
    assert big.index("0.4 → 0.6") < big.index("0.1 → 0.1"), "what is trained on comes first"
    assert [text for text in big if text in ("4", "384", "8.0 s", "48.0", "1.00 GiB")] == [
        "4",
        "384",
        "8.0 s",
        "48.0",
        "1.00 GiB",
    ]
    assert "+0.2; best 0.6 after iteration 4; ± 0.058 over prompts" in page.all_of("small")


def test_time_is_shared_out_by_hand(page: Page) -> None:
    """Four iterations of 2 s and three evaluations of 1.5 s: 12.5 s."""
    cells = page.all_of("td")
    expected = {
        "encode": ("1.0 s", "8.0%", "0.250 s"),
        "rollout": ("2.0 s", "16.0%", "0.500 s"),
        "reward": ("1.0 s", "8.0%", "0.250 s"),
        "update": ("3.0 s", "24.0%", "0.750 s"),
        "other": ("1.0 s", "8.0%", "0.250 s"),
        "evaluate": ("4.5 s", "36.0%", "1.500 s"),
    }
    for stage, numbers in expected.items():
        place = cells.index(stage)
        assert tuple(cells[place + 1 : place + 4]) == numbers
    assert cells[cells.index("all") + 1] == "12.5 s"
    assert "search" not in cells


def test_what_comes_from_a_run_is_text(page: Page) -> None:
    assert page.all_of("figcaption")[-3:] == list(PROMPTS)
    assert page.tags.count("script") == 5, "Bokeh and its log level, data, plots, the page's own"
    assert page.tags.count("img") == 2 * len(PROMPTS)
    # in data, too, nothing ends the element that it is in
    assert "</script> 猫" not in page.text
    assert HOSTILE.split()[0] not in page.text
    assert HOSTILE in {text for _, columns in page.all_sources() for text in columns.get("prompt", [])}


def test_nothing_outside_the_file_is_asked_for(page: Page) -> None:
    assert all(value.startswith("#") for _, value in page.loads), page.loads
    assert "default-src 'none'; img-src data: blob:" in page.text
    assert page.text.index("Content-Security-Policy") < page.text.index("<script")


def test_config_and_machine_are_those_of_the_files(page: Page) -> None:
    summary = json.loads((page.path.parent / "summary.json").read_text())
    cells = page.all_of("td")
    for name, value in summary["versions"].items():
        assert cells[cells.index(name) + 1] == (value or "not installed")
    assert cells[cells.index("commit") + 1] == (summary["commit"] or "not a checkout")
    # against the default: 120 iterations there, 4 here
    place = cells.index("train.iterations")
    assert cells[place + 1 : place + 3] == ["120", "4"]
    assert "train.learning_rate" not in cells
    assert "seed" not in cells


def test_runs_stand_beside_each_other_each_with_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "shibboleth")
    history = [{"after_iteration": 1, "changed": {"train.iterations": [1, 2]}}]
    config = {**CONFIG, "seed": 7, "train": {**CONFIG["train"], "iterations": 2}, "history": history}
    config["told"] = "${oc.env:SECRET}"
    rows = [{**row, "kl": 0.5, "reward/</script><b>": 1.0} for row in rows_of(2)]
    runs = make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run", rows=rows, config=config, prompts=("ü",))
    page = page_of(*runs)
    assert page.path == runs[0] / "report.html"
    sources = page.sources()
    assert {"loss 0", "loss 1", "kl 1", "reward/</script><b> 1"} <= sources.keys()
    # the name of a reward is text, too
    assert "reward/</script><b> 1" in page.data["handles"]["sources"]
    assert page.text.count("</script") == page.tags.count("script") == 5
    assert "kl 0" not in sources
    assert {*sources["loss 1"]["run"]} == {"b/run"}
    assert page.data["handles"]["run 1"].count("kl 1 1") == 1
    cells = page.all_of("td")
    place = cells.index("seed")
    assert cells[place + 1 : place + 3] == ["42", "7"]
    assert "train.learning_rate" not in cells
    # prompts that the runs share, and those of one alone
    assert [sorted(card) for card in page.data["gallery"]["cards"]] == [["0"]] * 3 + [["1"]]
    assert page.data["gallery"]["steps"] == [0, 2, 4]
    assert "b/run, from iteration 2 on: train.iterations 1 -> 2" in page.all_of("p")
    # a config is shown as it stands, and reads nothing of this machine
    assert "${oc.env:SECRET}" in cells
    assert "shibboleth" not in page.text


def test_a_run_that_still_trains_is_read_as_far_as_it_is(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rows=rows_of(3), is_finished=False)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 4, "lo')
    # an evaluation without its row, and one that is half written
    for iteration, content in (("000004", (run / "images/evaluation_000002/scores.json").read_text()), ("000006", "{")):
        (run / f"images/evaluation_{iteration}").mkdir()
        (run / f"images/evaluation_{iteration}/scores.json").write_text(content.replace(": 2,", ": 4,"))
    page = page_of(run)
    assert "Not at the end that its config wants" in page.text
    assert "3 of 4" in page.all_of("span")
    assert page.data["gallery"]["steps"] == [0, 2]
    assert page.sources()["loss 0"]["iteration"] == [1, 2, 3]
    assert "not known before the run's end" in page.all_of("td")


def test_a_run_that_measured_nothing_has_a_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "empty", is_finished=False)
    (run / "metrics.jsonl").unlink()
    said = page_of(run).all_of("p")
    assert said[0] == "Nothing has been measured yet."
    assert {"No evaluation has left images.", "No iteration has been timed."} <= {*said}


@pytest.mark.parametrize(
    ("scores", "weight", "said", "is_good"),
    [
        ([], 1.0, "No evaluation. The reward in training went from 0.1 to 0.3, means of the first and", None),
        ([0.9], 1.0, "shapes on held-out prompts is 0.9; there is one evaluation so far.", None),
        ([0.9, 0.7, 0.5], 1.0, "shapes on held-out prompts fell from 0.9 to 0.5 (-0.4).", False),
        ([0.9, 0.7, 0.5], -1.0, "shapes on held-out prompts fell from 0.9 to 0.5 (-0.4).", True),
        ([0.9, 0.7, 0.9], 1.0, "shapes on held-out prompts is 0.9, as at the beginning.", None),
    ],
)
def test_the_verdict_says_what_is_known(
    scores: list[float], weight: float, said: str, is_good: bool | None, tmp_path: Path
) -> None:
    rows: list[dict[str, Any]] = [{"iteration": i, "seconds": 1.0 * i, "reward/total": 0.1 * i} for i in range(1, 4)]
    for row, score in zip(rows, scores, strict=False):
        row["eval/shapes"] = score
    config = {**CONFIG, "reward": {"weights": {"shapes": weight}}}
    (run,) = read_runs([make_run(tmp_path / "run", rows=rows, prompts=(), config=config, is_finished=False)])
    headline = headline_of(run)
    assert headline.verdict.startswith(said)
    assert headline.is_good is is_good
    if scores:
        assert headline.scores[0].best == (max if weight > 0 else min)(scores)


def test_a_change_within_the_error_over_prompts_is_not_called_one(tmp_path: Path) -> None:
    """Of three prompts with scores 0, 0.1 and 0.2 each mean has an error of 0.058, their difference one of 0.082."""
    for gain, word in ((0.16, "perhaps by chance"), (0.17, "rose")):
        rows = [{"iteration": i, "seconds": 1.0 * i, "eval/shapes": 0.4 + gain * i} for i in range(2)]
        path = make_run(tmp_path / word, rows=rows, is_finished=False)
        # as in runs of before there was such a file
        (path / "evaluations.jsonl").unlink()
        (run,) = read_runs([path])
        assert word in headline_of(run).verdict


def test_a_change_is_judged_prompt_by_prompt_where_the_means_of_prompts_are_known(tmp_path: Path) -> None:
    """Each of three prompts gains .04, .05 or .06: an error of .0058 where those of the means say .082."""
    rows = [{"iteration": i, "seconds": 1.0 * i, "eval/shapes": 0.1 + 0.05 * i} for i in range(2)]
    path = make_run(tmp_path / "run", rows=rows, is_finished=False)
    for prompts, word in (([0.04, 0.15, 0.26], "rose"), ([0.14, 0.15, 0.16], "perhaps by chance")):
        lines = [{"iteration": 0, "means": {"shapes": [0.0, 0.1, 0.2]}}]
        lines.append({"iteration": 1, "means": {"shapes": prompts}})
        (path / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (run,) = read_runs([path])
        assert word in headline_of(run).verdict


def test_what_does_not_change_is_drawn_at_its_own_scale(tmp_path: Path) -> None:
    rows = [{"iteration": i, "seconds": 1.0 * i, "learning_rate": 0.001, "zeros": 0.0} for i in range(3)]
    runs = read_runs([make_run(tmp_path / "run", rows=rows, prompts=(), is_finished=False)])
    for metric, span in (("learning_rate", 0.0002), ("zeros", 1.0)):
        y_range: Any = _Drawing(runs, 1000).panel(metric).plot.y_range
        assert y_range.default_span == pytest.approx(span)


def test_a_long_run_is_thinned_to_a_small_file_that_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rows=rows_of(8), is_finished=False)
    rows = rows_of(10_000, evaluate_every=20)
    (run / "metrics.jsonl").write_text("".join(json.dumps(_finite(row)) + "\n" for row in rows))
    page = page_of(run)
    assert len(page.text) < 10e6
    loss, reward = (page.sources()[f"{name} 0"] for name in ("loss", "reward/total"))
    assert len(loss["y"]) <= 1000
    assert loss["value"] == loss["y"] == [1 / i for i in loss["iteration"]]
    assert loss["seconds"] == [2.0 * i for i in loss["iteration"]]
    assert loss["iteration"][0] == 1
    assert loss["iteration"][-1] == 10_000
    assert (min(reward["y"]), max(reward["y"])) == (-9999 / 7, 10_000 / 7)
    assert any("at most 1000 points each" in text for text in page.all_of("p"))


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value if math.isfinite(value) else None for name, value in row.items()}


# the command


def test_the_command_takes_runs_one_by_one_or_as_a_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make_run(tmp_path / name) for name in ("it's (1), [a]", "b")]
    given = [f"run={run}" for run in runs]
    assert cli.main(["report", *given, f"output={tmp_path / 'new' / 'two.html'}"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"written to {tmp_path / 'new' / 'two.html'}"
    titles = Page(tmp_path / "new" / "two.html").all_of("h1")
    assert titles == ["it's (1), [a], b"]
    assert cli.main(["report", f"run=[{runs[1]}]"]) == 0
    assert Page(runs[1] / "report.html").all_of("h1") == ["b"]


def test_a_key_given_several_times_becomes_a_list() -> None:
    assert gathered(["run=a", "output=x", "run=b c"], ["run"]) == ["output=x", "run=['a','b c']"]
    assert gathered(["run=[a,b]", "run=c"], ["run"]) == ["run=['a','b','c']"]
    assert gathered(["run=a", "output=x"], ["run"]) == ["run=a", "output=x"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "nothing to report on; give run=outputs/NAME"),
        (["run=nowhere"], "nowhere is not a run directory"),
        (["run={run}", "run={run}"], "is given twice"),
        (["run=[[a]]"], "run must be a directory or a list of them"),
        (["run={run}", "output=/proc/nowhere/page.html"], "cannot write /proc/nowhere/page.html"),
        (["run={broken}"], "is not the config of a run"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, broken = make_run(tmp_path / "run", is_finished=False), make_run(tmp_path / "broken", is_finished=False)
    (broken / "config.yaml").write_text("a: [1\n")
    words = [word.replace("{run}", str(run)).replace("{broken}", str(broken)) for word in words]
    assert cli.main(["report", *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert says in line
