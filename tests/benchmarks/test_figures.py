"""What READMEs say in figures is what the result files say."""

import json
import re

import pytest

from benchmarks.figures.__main__ import ROOT, written
from benchmarks.figures.chosen import FIGURES, HEADLINE
from benchmarks.figures.figure import Figure
from benchmarks.report import RESULTS

ALL = [*HEADLINE, *(figure for figures in FIGURES.values() for figure in figures)]


def test_the_readmes_are_as_the_result_files_have_it() -> None:
    """Else: python -m benchmarks.figures."""
    for path, text in written().items():
        assert path.read_text(encoding="utf-8") == text


def test_a_changed_result_changes_the_readme(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = json.loads((RESULTS / f"{HEADLINE[0].result}.json").read_text())
    for curve in changed["sides"]["nft"]:
        for point in curve["points"]:
            point["reported"] = 0.43
    monkeypatch.setattr(Figure, "data", property(lambda self: _data(self, changed)))
    text = written()[ROOT / "README.md"]
    assert "61%, 78%, 43%" in text
    assert "0.0 times sooner" in text


def _data(figure: Figure, changed: dict[str, object]) -> dict[str, object]:
    if figure.result == HEADLINE[0].result:
        return changed
    data: dict[str, object] = json.loads((RESULTS / f"{figure.result}.json").read_text())
    return data


@pytest.mark.parametrize("figure", ALL, ids=lambda figure: figure.what[:40])
def test_a_figure_tells_its_origin(figure: Figure) -> None:
    assert figure.commit in (RESULTS / f"{figure.result}.md").read_text()
    is_measured = not {"counted", "modelled"} & set(re.split("[_.]", figure.result))
    assert (figure.kind == "measured") == is_measured
    assert figure.device.startswith("CPU" if is_measured else figure.kind)


@pytest.mark.parametrize(
    ("what", "value"),
    [
        # by hand from the tables of the results
        ("`nft`, the default: sooner than flow_grpo's own code where that ends", "6.6x"),
        ("the same, both compiled", "1.22x, 1.27x, 1.05x"),
        ("the same without KL", "3.2x (5.06 against 1.58 images/s)"),
        ("best of N at 20, 40, 80, 160 network evaluations, untrained model", "68%, 88%, 96%, 100%"),
        ("one of several ranks fails, job restarts", "13 faults, 0 runs that differ"),
        ("error of the memory planner against what is allocated", "at most 1.7% in 9 cases"),
    ],
)
def test_figures_are_those_of_the_results_own_tables(what: str, value: str) -> None:
    assert [figure.value for figure in ALL if figure.what == what] == [value]
