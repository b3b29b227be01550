"""Text below images: broken into lines that fit, in a font that has its characters.

matplotlib ships DejaVu Sans, so that Latin, Greek and Cyrillic look the same on every machine.  Other scripts take the
first of this machine's fonts that has all of a text's characters; where there is none, the text says so in place of
drawing boxes, and a warning says it once.
"""

import logging
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import matplotlib
from matplotlib.font_manager import fontManager
from matplotlib.ft2font import FT2Font
from PIL import ImageFont

LINE_PIXELS = 15
_FONT_PIXELS = 12
# of the fonts of a machine, those that are made for many scripts before others
_FOR_MANY = ("Noto", "CJK", "Unifont", "Unicode")
# these have a box for every character there is
_BOXES = ("LastResort", "NotDef")
_log = logging.getLogger(__name__)


def plain_font() -> ImageFont.FreeTypeFont:
    """DejaVu Sans."""
    return _font(_dejavu())


def written(text: str) -> tuple[str, ImageFont.FreeTypeFont]:
    """The text as it can be written here, and the font that has it."""
    text = " ".join(text.split())
    if not (lacking := _lacking(_dejavu(), frozenset(text))):
        return text, plain_font()
    if found := _having(frozenset(text)):
        return text, _font(found)
    _warn_once()
    parts = [
        (f"[{len(part)} characters that no font here has]" if is_lacking else "".join(part))
        for is_lacking, group in groupby(text, lambda c: c in lacking)
        for part in [list(group)]
    ]
    return "".join(parts), plain_font()


def lines_of(text: str, width: int, most: int) -> tuple[list[str], ImageFont.FreeTypeFont]:
    """At most so many lines that fit a width in pixels, and their font; an ellipsis ends what was cut."""
    text, font = written(text)
    lines = _broken(text, width, font)
    if len(lines) > most:
        last = lines[most - 1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        lines = [*lines[: most - 1], last + "…"]
    return lines, font


def num_lines(texts: Iterable[str], width: int, most: int) -> int:
    """As many lines as the longest of the texts takes, at most so many."""
    return max((len(lines_of(text, width, most)[0]) for text in texts), default=1)


def _broken(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and font.getlength(f"{lines[-1]} {word}") > width:
            lines.append("")
        line = f"{lines[-1]} {word}".strip()
        # a word that is wider than a line, as a sentence without blanks is
        while len(line) > 1 and font.getlength(line) > width:
            size = _fitting(line, width, font)
            lines[-1:] = [line[:size], ""]
            line = line[size:]
        lines[-1] = line
    return lines


def _fitting(line: str, width: int, font: ImageFont.FreeTypeFont) -> int:
    size = 1
    while size < len(line) and font.getlength(line[: size + 1]) <= width:
        size += 1
    return size


@lru_cache(maxsize=8)
def _font(path: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, _FONT_PIXELS)


def _dejavu() -> str:
    return str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf")


@lru_cache(maxsize=256)
def _having(characters: frozenset[str]) -> str | None:
    return next((path for path in _installed() if not _lacking(path, characters)), None)


@lru_cache(maxsize=1)
def _installed() -> Sequence[str]:
    normal = dict.fromkeys(entry.fname for entry in fontManager.ttflist if entry.style == "normal")
    paths = [path for path in normal if not any(word in Path(path).name for word in _BOXES)]
    return sorted(paths, key=lambda path: (not any(word in Path(path).name for word in _FOR_MANY), path))


def _lacking(path: str, characters: frozenset[str]) -> frozenset[str]:
    font = _face(path)
    if font is None:
        return characters
    return frozenset(c for c in characters if not c.isspace() and font.get_char_index(ord(c)) == 0)


@lru_cache(maxsize=64)
def _face(path: str) -> FT2Font | None:
    try:
        return FT2Font(path)
    # a font that was removed since matplotlib listed it, or that it cannot read
    except (OSError, RuntimeError):
        return None


@lru_cache(maxsize=1)
def _warn_once() -> None:
    _log.warning(
        "no font of this machine has all characters of the prompts, which pictures leave out; install one, as "
        "fonts-noto-cjk, and delete matplotlib's list of fonts (%s/fontlist*.json)",
        matplotlib.get_cachedir(),
    )
