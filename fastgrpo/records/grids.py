"""Grids of images that people look at: enlarged without smoothing, each with its prompt below, as PNG.

Images may differ in size: all cells are as high and wide as the largest, and gray shows around those that are not.
Letters: B images, C = 3 channels, H W pixels.
"""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MIN_PIXELS = 96
MARGIN = 10
HEADER_PIXELS = 24
_PAIR_GAP = 4
_FONT_PIXELS = 12
_LINE_PIXELS = 15
_MAX_LINES = 3
_MAX_PAGE_PIXELS = 1400
_INK = (30, 30, 30)
_AROUND = (226, 226, 226)
_YES, _NO = ("✓", (20, 130, 60)), ("✗", (190, 40, 40))


def draw_grid(
    images: Sequence[np.ndarray], labels: Sequence[str], verified: Sequence[bool] | None = None
) -> Image.Image:
    """One cell an image [H, W, C] (uint8), its label below; ``verified`` puts a check or a cross before the label."""
    return _draw([images], labels, verified, headers=[])


def draw_before_after(before: Sequence[np.ndarray], after: Sequence[np.ndarray], labels: Sequence[str]) -> Image.Image:
    """One cell a label: the image [H, W, C] before training on the left, after it on the right."""
    return _draw([before, after], labels, None, headers=["before", "after"])


def to_uint8(image_CHW: Tensor) -> np.ndarray:
    """An image in [0, 1], whatever else clamped and NaN drawn as black, as [H, W, C] bytes; or [B, ...] of them."""
    pixels = image_CHW.detach().float().nan_to_num(0.0).clamp(0.0, 1.0).mul(255.0).round()
    return pixels.movedim(-3, -1).byte().cpu().numpy()


def png(image: Image.Image) -> bytes:
    """The bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def cell_origin(index: int, num_cells: int, num_panels: int, height: int, width: int) -> tuple[int, int]:
    """(x, y) of the top left pixel of a cell's first image; of use to whoever reads a grid back."""
    cell_width, cell_height, _ = _cell_size(num_panels, height, width)
    row, column = divmod(index, _num_columns(num_cells, cell_width))
    header = HEADER_PIXELS if num_panels > 1 else 0
    return MARGIN + column * (cell_width + MARGIN), MARGIN + header + row * (cell_height + MARGIN)


def enlargement(height: int, width: int) -> int:
    """By how much an image is enlarged: the least whole number that makes its shorter side MIN_PIXELS."""
    return max(1, math.ceil(MIN_PIXELS / min(height, width)))


def _draw(
    panels: Sequence[Sequence[np.ndarray]],
    labels: Sequence[str],
    verified: Sequence[bool] | None,
    headers: Sequence[str],
) -> Image.Image:
    num_cells = len(labels)
    if any(len(panel) != num_cells for panel in panels):
        raise ValueError(f"{num_cells} labels for {[len(panel) for panel in panels]} images; give one an image")
    if num_cells == 0:
        raise ValueError("no images to draw; give at least one evaluation prompt")
    height, width = (max(pixels.shape[side] for panel in panels for pixels in panel) for side in (0, 1))
    cell_width, cell_height, scale = _cell_size(len(panels), height, width)
    columns = _num_columns(num_cells, cell_width)
    rows = math.ceil(num_cells / columns)
    top = HEADER_PIXELS if headers else 0
    size = (MARGIN + columns * (cell_width + MARGIN), top + MARGIN + rows * (cell_height + MARGIN))
    page = Image.new("RGB", size, "white")
    canvas = ImageDraw.Draw(page)
    for index, label in enumerate(labels):
        x, y = cell_origin(index, num_cells, len(panels), height, width)
        for panel, pixels in enumerate(panels):
            left = x + panel * (width * scale + _PAIR_GAP)
            image = Image.fromarray(pixels[index])
            image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
            canvas.rectangle((left, y, left + width * scale - 1, y + height * scale - 1), fill=_AROUND)
            page.paste(image, (left + (width * scale - image.width) // 2, y + (height * scale - image.height) // 2))
            if headers and index < columns:
                canvas.text((left, MARGIN), headers[panel], fill=_INK, font=_font())
        mark = None if verified is None else verified[index]
        _write_label(canvas, (x, y + height * scale + 3), cell_width, label, mark)
    return page


def _cell_size(num_panels: int, height: int, width: int) -> tuple[int, int, int]:
    scale = enlargement(height, width)
    return (
        num_panels * width * scale + (num_panels - 1) * _PAIR_GAP,
        height * scale + 3 + _MAX_LINES * _LINE_PIXELS,
        scale,
    )


def _num_columns(num_cells: int, cell_width: int) -> int:
    square = math.ceil(math.sqrt(num_cells))
    return max(1, min(square, _MAX_PAGE_PIXELS // (cell_width + MARGIN)))


def _write_label(
    canvas: ImageDraw.ImageDraw, corner: tuple[int, int], width: int, label: str, verified: bool | None
) -> None:
    x, y = corner
    indent = 0
    if verified is not None:
        symbol, color = _YES if verified else _NO
        canvas.text((x, y), symbol, fill=color, font=_font())
        indent = 14
    for line, text in enumerate(_wrapped(label, width - indent)):
        canvas.text((x + indent, y + line * _LINE_PIXELS), text, fill=_INK, font=_font())


def _wrapped(label: str, width: int) -> list[str]:
    """At most _MAX_LINES lines that fit the width; an ellipsis ends what was cut."""
    lines = [""]
    for word in label.split():
        if lines[-1] and _font().getlength(f"{lines[-1]} {word}") > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    cut = len(lines) > _MAX_LINES
    lines = lines[:_MAX_LINES]
    if cut:
        lines[-1] += " …"
    return [_shortened(line, width) for line in lines]


def _shortened(line: str, width: int) -> str:
    if _font().getlength(line) <= width:
        return line
    while line and _font().getlength(line + "…") > width:
        line = line[:-1]
    return line + "…"


def _font() -> ImageFont.FreeTypeFont:
    # matplotlib ships it, so that a grid looks the same on every machine
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), _FONT_PIXELS)
