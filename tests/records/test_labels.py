"""Text below images: whole words in lines that fit, every script that a font here has, and words where none has it."""

import logging
from pathlib import Path

import pytest

from fastgrpo.records import labels
from fastgrpo.records.grids import MOST_LINES, draw_grid, enlargement
from fastgrpo.records.labels import lines_of, num_lines, plain_font, written
from tests.records.pictures import gray

LONG = "a photograph of an old lighthouse on a cliff above a rough sea at dusk, with seven gulls around its lamp"


@pytest.fixture
def no_other_fonts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels, "_installed", lambda: [])
    labels._having.cache_clear()
    labels._warn_once.cache_clear()


def test_a_long_prompt_is_shown_whole() -> None:
    lines, font = lines_of(LONG, 120, MOST_LINES)
    assert " ".join(lines) == LONG
    assert len(lines) == num_lines(["short", LONG], 120, MOST_LINES) > 3
    assert all(font.getlength(line) <= 120 for line in lines)
    # no line would have taken the first word of the next one
    firsts = [line.split()[0] for line in lines[1:]]
    assert all(font.getlength(f"{line} {word}") > 120 for line, word in zip(lines, firsts, strict=False))


def test_what_does_not_fit_ends_with_an_ellipsis_and_a_word_without_blanks_is_broken() -> None:
    lines, font = lines_of("x" * 500, 60, 3)
    assert len(lines) == 3
    assert lines[-1].endswith("…")
    assert all(font.getlength(line) <= 60 for line in lines)
    assert "".join(lines_of("y" * 40, 60, MOST_LINES)[0]) == "y" * 40


def test_a_page_has_room_for_its_longest_label() -> None:
    short, long = (draw_grid([gray(64)], [label]) for label in ("a", LONG))
    width = 64 * enlargement(64, 64)
    assert long.height - short.height == 15 * (num_lines([LONG], width, MOST_LINES) - 3)


@pytest.mark.usefixtures("no_other_fonts")
def test_a_script_that_no_font_has_is_said_to_be_so_and_once_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert written("a 红色 circle 圆")[0] == (
            "a [2 characters that no font here has] circle [1 characters that no font here has]"
        )
        written("红色")
    assert caplog.text.count("fonts-noto-cjk") == 1


def test_a_script_takes_a_font_that_has_it_and_none_that_has_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other font need be installed: a small one is made to lack what the other has."""
    asked: list[frozenset[str]] = []
    plain = labels._dejavu()
    other = str(Path(plain).with_name("DejaVuSans-Bold.ttf"))

    def lacking(path: str, characters: frozenset[str]) -> frozenset[str]:
        asked.append(characters)
        return characters & {"é"} if path == plain else frozenset()

    monkeypatch.setattr(labels, "_lacking", lacking)
    monkeypatch.setattr(labels, "_installed", lambda: [plain, other])
    labels._having.cache_clear()
    text, font = written("café")
    assert (text, font.path) == ("café", other)
    assert written("cafe")[1].path == plain_font().path
    labels._having.cache_clear()


def test_matplotlibs_font_of_boxes_is_not_taken_for_one_that_has_everything() -> None:
    labels._having.cache_clear()
    assert not any("LastResort" in path for path in labels._installed())
