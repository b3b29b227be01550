"""The picture of a run's curves: which panels it has, what is in them, and that it can be read when it is small."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from fastgrpo.records import plots
from fastgrpo.records.plots import draw_curves, measured_panels

ROWS: list[dict[str, Any]] = [
    {"iteration": 0, "seconds": 0.0, "eval/strict": 0.42, "eval/pick_score": 21.0, "eval/graded": 0.7},
    {"iteration": 1, "seconds": 90.0, "images": 96, "reward/total": 0.5, "kl": None, "images_per_second": 1.0},
    {"iteration": 2, "seconds": 150.0, "images": 192, "reward/total": 0.6, "images_per_second": 50.0},
    {"iteration": 3, "seconds": 151.0, "images": 288, "images_per_second": 2.0, "compilations": 4, "eval/strict": 0.6},
    {"iteration": 4, "seconds": 152.0, "images": 384, "images_per_second": 40.0, "compilations": 0, "drift": 2e-4},
]
BLUE = (31, 119, 180)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Axes]:
    """The panels of what is drawn, in their order."""
    seen: list[Axes] = []
    draw = plots._draw_panel

    def note(axes: Axes, *others: Any) -> None:
        draw(axes, *others)
        seen.append(axes)

    monkeypatch.setattr(plots, "_draw_panel", note)
    return seen


def lines(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    """What is drawn under each label; ends of a line across are in shares of the width."""
    found = {}
    for line in axes.get_lines():
        at, values = (np.asarray(line.get_data()[side], dtype=float).tolist() for side in (0, 1))
        found[str(line.get_label())] = list(zip(at, values, strict=True))
    return found


def test_what_was_measured_has_a_panel_and_the_evaluation_comes_first(tmp_path: Path, drawn: list[Axes]) -> None:
    draw_curves(ROWS, tmp_path / "a.png", title="run")
    assert [axes.get_title() for axes in drawn] == [
        # scores of another size would be a line at the bottom of theirs
        "evaluation, plain noise",
        "evaluation, plain noise",
        "reward in training",
        # kl was never a number, and nothing was said of groups
        "drift from the old policy, an element",
        "images/s, without compilation",
    ]
    pick, others, reward, _, speed = map(lines, drawn)
    # in minutes, since the run has two of them
    assert pick == {"pick_score": [(0.0, 21.0)]}
    assert others == {"graded": [(0.0, 0.7)], "strict": [(0.0, 0.42), (151 / 60, 0.6)]}
    assert reward == {"reward/total": [(1.5, 0.5), (2.5, 0.6)]}
    # neither the first iteration nor one that compiled
    assert speed["images_per_second"] == [(2.5, 50.0), (152 / 60, 40.0)]
    assert [y for _, y in speed["median 45"]] == [45.0, 45.0]
    assert {axes.get_xlim() for axes in drawn} == {drawn[0].get_xlim()}


def test_groups_without_spread_are_shown_where_there_were_any(tmp_path: Path, drawn: list[Axes]) -> None:
    groups = [{"iteration": n, "seconds": n, "reward/group_std": 0.2, "zero_variance_groups": 0.0} for n in (1, 2)]
    assert [panel.title for panel in measured_panels(groups, "seconds")] == ["spread of rewards in a group"]
    # what nft's retries gain where no group had to be made again
    retried = [{**row, "search/gain": 0.0} for row in groups]
    assert measured_panels(retried, "seconds") == measured_panels(groups, "seconds")
    retried[1]["search/gain"] = 0.1
    assert [panel.title for panel in measured_panels(retried, "seconds")][1:] == ["reward gained by noise"]
    groups[1]["zero_variance_groups"] = 0.25
    draw_curves(groups, tmp_path / "a.png", title="run")
    spread, without = drawn
    assert lines(spread) == {"reward/group_std": [(1.0, 0.2), (2.0, 0.2)]}
    assert lines(without) == {"zero_variance_groups": [(1.0, 0.0), (2.0, 0.25)]}
    # beside each other
    assert spread.get_position().y0 == pytest.approx(without.get_position().y0)


def test_where_a_panel_is_left_over_the_first_is_as_wide_as_two(tmp_path: Path, drawn: list[Axes]) -> None:
    draw_curves(ROWS, tmp_path / "a.png", title="run")
    assert len(drawn) == 5
    assert drawn[0].get_position().width > 1.8 * drawn[1].get_position().width


def test_text_can_be_read_in_a_picture_8_cm_wide(tmp_path: Path, drawn: list[Axes]) -> None:
    draw_curves(ROWS, tmp_path / "a.png", title="run")
    shrunk = 8 / 2.54 / drawn[0].get_figure(root=True).get_figwidth()  # type: ignore[union-attr]
    for axes in drawn:
        texts = [axes.title, axes.xaxis.label, *axes.get_xticklabels(), *axes.get_yticklabels()]
        legend = axes.get_legend()
        texts += legend.get_texts() if legend else []
        assert min(float(text.get_fontsize()) for text in texts) * shrunk >= 4.5
        # nothing stands over the edge
        left, right = (axes.title.get_window_extent().x0, axes.title.get_window_extent().x1)
        assert left >= 0
        assert right <= axes.get_figure(root=True).bbox.x1  # type: ignore[union-attr]


def test_equal_runs_have_equal_pictures_and_nothing_is_said_to_be_nothing(tmp_path: Path) -> None:
    for name, rows in (("a", ROWS), ("b", ROWS), ("empty", [])):
        draw_curves(rows, tmp_path / f"{name}.png", title="run")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    has_lines = [
        bool((np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")) == BLUE).all(axis=-1).any())
        for name in ("a", "empty")
    ]
    assert has_lines == [True, False]
    with pytest.raises(ValueError, match="x must be one of"):
        draw_curves(ROWS, tmp_path / "c.png", title="run", x="epochs")
