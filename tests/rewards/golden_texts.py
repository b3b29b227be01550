"""Renders ``fastgrpo/rewards/golden_set/texts``: python tests/rewards/golden_texts.py"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

DIRECTORY = Path(__file__).parents[2] / "fastgrpo" / "rewards" / "golden_set" / "texts"
WIDTH, HEIGHT = 256, 128
# prompt, lines of the picture (None: noise), reward by hand
PAIRS: list[tuple[str, list[str] | None, float]] = [
    ('a banner with the words "HELLO WORLD"', ["HELLO WORLD"], 1.0),
    ('a banner with the words "HELLO WORLD"', ["HELLO WORKD"], 1 - 1 / 10),
    ('a shop sign that says "OPEN"', ["JURY"], 0.0),
    ('a shop sign that says "OPEN"', None, 0.0),
    ('a shop sign that says "OPEN"', [], 0.0),
    ("a mug with “Good Morning” on it", ["GOOD", "MORNING"], 1.0),
    ('a poster that reads "new york"', ["New"], 1 - 4 / 7),
    ('a street sign, "Baker" above "Street"', ["Baker", "Street"], 1.0),
]


def main() -> None:
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    (DIRECTORY / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt, _, _ in PAIRS), encoding="utf-8")
    for row, (_, lines, _) in enumerate(PAIRS):
        _picture(lines).save(DIRECTORY / f"{row}.png", optimize=True)


def _picture(lines: list[str] | None) -> Image.Image:
    if lines is None:
        # gray noise of few levels: a PNG keeps it in a few kilobytes
        levels = np.random.default_rng(0).integers(0, 4, (HEIGHT, WIDTH), dtype=np.uint8)
        return Image.fromarray(levels * 85)
    picture = Image.new("L", (WIDTH, HEIGHT), 235)
    text, font = "\n".join(lines), ImageFont.load_default(36)
    ImageDraw.Draw(picture).multiline_text(
        (WIDTH / 2, HEIGHT / 2), text, fill=20, font=font, anchor="mm", align="center"
    )
    return picture


if __name__ == "__main__":
    main()
