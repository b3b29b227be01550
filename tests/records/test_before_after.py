"""before_after.png: what was won and what was lost, with marks and rewards, and where the rest is."""

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastgrpo.records import before_after
from fastgrpo.records.before_after import MOST_GAINED, MOST_LOST, Shown, choose, write_before_after
from tests.records.pictures import gray

PROMPTS = [f"prompt {n}" for n in range(20)]


def shown(totals: list[float] | None, verified: list[bool] | None = None, shade: int = 90) -> Shown:
    return Shown([gray(96, shade)] * len(PROMPTS), PROMPTS, totals, verified)


def test_those_that_gained_most_come_first_and_those_that_lost_most_last() -> None:
    before = [0.5, 0.25, 0.5, 0.9, 0.5, 0.2]
    after = [0.6, 0.75, 0.5, 0.1, 1.0, 0.1]
    # gains of .5 twice, of which the better image is first; what stays is not shown
    assert choose(before, after) == [4, 1, 0, 3, 5]
    many = choose([0.0] * 30, [1.0] * 20 + [-1.0] * 10)
    assert len(many) == MOST_GAINED + MOST_LOST
    assert choose([1.0], [1.0]) == []


def test_the_caption_counts_all_pairs_not_those_that_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages: dict[str, tuple[list[str], str, object, object]] = {}
    draw = before_after.draw_before_after

    def note(before, after, labels, verified, scores, caption):  # type: ignore[no-untyped-def]
        pages[caption] = (list(labels), caption, verified, scores)
        return draw(before, after, labels, verified, scores, caption)

    monkeypatch.setattr(before_after, "draw_before_after", note)
    gained, lost = [n / 100 for n in range(1, 13)], [-0.2, -0.1]
    before = [0.5] * 20
    after = [0.5 + gain for gain in gained] + [0.5 + gain for gain in lost] + [0.5] * 6
    write_before_after(tmp_path, shown(before, [False] * 20))
    pages.clear()
    write_before_after(tmp_path, shown(after, [True] * 4 + [False] * 16, shade=200))
    (all_labels, *_), (labels, caption, verified, scores) = pages.values()
    assert all_labels == PROMPTS
    # the twelfth gained most
    assert labels == [f"prompt {n}" for n in (*range(11, 2, -1), 12, 13)]
    assert "Of 20 pairs 12 gained reward and 2 lost some; 4 became right, 0 wrong" in caption
    assert "here the 9 that gained and the 2 that lost most, all in before_after_all.png" in caption
    assert verified == ([False] * 11, [False] * 8 + [True] + [False] * 2)
    assert scores == ([0.5] * 11, [after[int(label.split()[1])] for label in labels])
    assert {path.name for path in tmp_path.iterdir()} == {"before_after.png", "before_after_all.png", ".first.npz"}


def test_marks_and_rewards_stand_below_each_image_of_a_pair(tmp_path: Path) -> None:
    write_before_after(tmp_path, shown([0.0] * 20, [False] * 20))
    write_before_after(tmp_path, shown([1.0] + [0.0] * 19, [True] + [False] * 19, shade=200))
    page = np.asarray(Image.open(tmp_path / "before_after.png").convert("RGB")).astype(int)
    # below the header, one pair of 96 pixels
    line = page[34 + 96 + 3 : 34 + 96 + 18]
    before, after = line[:, 10 : 10 + 96], line[:, 110 : 110 + 96]
    reddest = (before[..., 0] - before[..., 1]).max()
    greenest = (after[..., 1] - after[..., 0]).max()
    assert reddest > 60
    assert greenest > 60
    # a number beside each mark
    assert (before[:, 14:40] < 100).all(axis=-1).any()
    assert (after[:, 14:40] < 100).all(axis=-1).any()
    assert tuple(page[34 + 5, 10 + 5]) == (90, 90, 90)
    assert tuple(page[34 + 5, 110 + 5]) == (200, 200, 200)


def test_what_is_not_known_is_not_drawn_and_other_prompts_begin_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_before_after(tmp_path, shown(None))
    write_before_after(tmp_path, shown(None, shade=200))
    assert caplog.text == ""
    with caplog.at_level(logging.WARNING):
        write_before_after(tmp_path, Shown([gray(96, 30)], ["another"], [1.0], None))
    assert "starts anew" in caplog.text
    page = np.asarray(Image.open(tmp_path / "before_after_all.png"))
    assert tuple(page[34 + 5, 10 + 5]) == tuple(page[34 + 5, 110 + 5]) == (30, 30, 30)
