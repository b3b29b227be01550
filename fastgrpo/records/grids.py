"""Grids of images that people look at: enlarged without smoothing, each with its prompt below, as PNG.

Images may differ in size: all cells are as high and wide as the largest, and gray shows around those that are not.
Letters: B images, C = 3 channels, H W pixels.
"""

import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastgrpo.records.labels import LINE_PIXELS, lines_of, num_lines, plain_font

MIN_PIXELS = 96
MARGIN = 10
HEADER_PIXELS = 24
# of a label: as many as the longest one takes, within these
LEAST_LINES, MOST_LINES = 3, 12
_PAIR_GAP = 4
_MARK_PIXELS = 14
_MAX_PAGE_PIXELS = 1400
_INK = (30, 30, 30)
_AROUND = (226, 226, 226)
_YES, _NO = ("✓", (20, 130, 60)), ("✗", (190, 40, 40))

Font = ImageFont.FreeTypeFont
Marks = Sequence[bool] | None
Scores = Sequence[float] | None


def draw_grid(
    images: Sequence[np.ndarray], labels: Sequence[str], verified: Marks = None, scores: Scores = None
) -> Image.Image:
    """One cell an image [H, W, C] (uint8), its label below; ``verified`` puts a check or a cross before the label.

    scores: of each image, above its label.
    """
    if scores is not None:
        return _draw([images], labels, [verified], [scores], headers=[])
    return _draw([images], labels, [verified], [], headers=[])


def draw_before_after(
    before: Sequence[np.ndarray],
    after: Sequence[np.ndarray],
    labels: Sequence[str],
    verified: tuple[Marks, Marks] = (None, None),
    scores: tuple[Scores, Scores] = (None, None),
    caption: str = "",
) -> Image.Image:
    """One cell a label: the image [H, W, C] before training on the left, after it on the right.

    Each with its mark and its score below where there are any; the caption stands below all.
    """
    given = [one for one in scores if one is not None]
    return _draw([before, after], labels, verified, given, headers=["before", "after"], caption=caption)


def to_uint8(image_CHW: Tensor) -> np.ndarray:
    """An image in [0, 1], whatever else clamped and NaN drawn as black, as [H, W, C] bytes; or [B, ...] of them."""
    pixels = image_CHW.detach().float().nan_to_num(0.0).clamp(0.0, 1.0).mul(255.0).round()
    return pixels.movedim(-3, -1).byte().cpu().numpy()


def png(image: Image.Image) -> bytes:
    """The bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def cell_origin(
    index: int, num_cells: int, num_panels: int, height: int, width: int, lines: int = LEAST_LINES
) -> tuple[int, int]:
    """(x, y) of the top left pixel of a cell's first image; of use to whoever reads a grid back.

    lines: of text below the images, one more than its label's where scores stand above that.
    """
    cell_width, cell_height, _ = _cell_size(num_panels, height, width, lines)
    row, column = divmod(index, _num_columns(num_cells, cell_width))
    header = HEADER_PIXELS if num_panels > 1 else 0
    return MARGIN + column * (cell_width + MARGIN), MARGIN + header + row * (cell_height + MARGIN)


def enlargement(height: int, width: int) -> int:
    """By how much an image is enlarged: the least whole number that makes its shorter side MIN_PIXELS."""
    return max(1, math.ceil(MIN_PIXELS / min(height, width)))


def _draw(
    panels: Sequence[Sequence[np.ndarray]],
    labels: Sequence[str],
    verified: Sequence[Marks],
    scores: Sequence[Sequence[float]],
    headers: Sequence[str],
    caption: str = "",
) -> Image.Image:
    num_cells = len(labels)
    if any(len(panel) != num_cells for panel in panels):
        raise ValueError(f"{num_cells} labels for {[len(panel) for panel in panels]} images; give one an image")
    if num_cells == 0:
        raise ValueError("no images to draw; give at least one evaluation prompt")
    height, width = (max(pixels.shape[side] for panel in panels for pixels in panel) for side in (0, 1))
    scale = enlargement(height, width)
    # marks of a single image stand before its label, unless its score takes a line of its own
    in_a_line = bool(scores) or (len(panels) > 1 and any(marks is not None for marks in verified))
    indent = _MARK_PIXELS if verified[0] is not None and not in_a_line else 0
    label_width = len(panels) * (width * scale + _PAIR_GAP) - _PAIR_GAP - indent
    lines = max(LEAST_LINES, in_a_line + num_lines(labels, label_width, MOST_LINES))
    cell_width, cell_height, _ = _cell_size(len(panels), height, width, lines)
    columns = _num_columns(num_cells, cell_width)
    rows = math.ceil(num_cells / columns)
    page_width = MARGIN + columns * (cell_width + MARGIN)
    below, font = lines_of(caption, page_width - 2 * MARGIN, MOST_LINES) if caption else ([], plain_font())
    top = HEADER_PIXELS if headers else 0
    bottom = top + MARGIN + rows * (cell_height + MARGIN)
    page = Image.new("RGB", (page_width, bottom + len(below) * LINE_PIXELS + MARGIN * bool(below)), "white")
    canvas = ImageDraw.Draw(page)
    for index, label in enumerate(labels):
        x, y = cell_origin(index, num_cells, len(panels), height, width, lines)
        under = y + height * scale + 3
        for panel, pixels in enumerate(panels):
            left = x + panel * (width * scale + _PAIR_GAP)
            image = Image.fromarray(pixels[index])
            image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
            canvas.rectangle((left, y, left + width * scale - 1, y + height * scale - 1), fill=_AROUND)
            page.paste(image, (left + (width * scale - image.width) // 2, y + (height * scale - image.height) // 2))
            if headers and index < columns:
                canvas.text((left, MARGIN), headers[panel], fill=_INK, font=plain_font())
            marks = verified[panel]
            if marks is not None:
                symbol, color = _YES if marks[index] else _NO
                canvas.text((left, under), symbol, fill=color, font=plain_font())
            if scores:
                indented = left + (_MARK_PIXELS if marks is not None else 0)
                canvas.text((indented, under), f"{scores[panel][index]:.3g}", fill=_INK, font=plain_font())
        _write(canvas, (x + indent, under + in_a_line * LINE_PIXELS), *lines_of(label, label_width, MOST_LINES))
    _write(canvas, (MARGIN, bottom), below, font)
    return page


def _cell_size(num_panels: int, height: int, width: int, lines: int) -> tuple[int, int, int]:
    scale = enlargement(height, width)
    return (
        num_panels * width * scale + (num_panels - 1) * _PAIR_GAP,
        height * scale + 3 + lines * LINE_PIXELS,
        scale,
    )


def _num_columns(num_cells: int, cell_width: int) -> int:
    square = math.ceil(math.sqrt(num_cells))
    return max(1, min(square, _MAX_PAGE_PIXELS // (cell_width + MARGIN)))


def _write(canvas: ImageDraw.ImageDraw, corner: tuple[int, int], lines: Sequence[str], font: Font) -> None:
    x, y = corner
    for line, text in enumerate(lines):
        canvas.text((x, y + line * LINE_PIXELS), text, fill=_INK, font=font)
