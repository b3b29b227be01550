"""The images of an evaluation one by one, small, each with its prompt and its scores: what a report shows.

    images/evaluation_000045/scores.json, 00.png, 01.png, ...

Letters: P prompts, G images of each.
"""

import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from fastgrpo.evaluation import EvaluationResult, statistics
from fastgrpo.files.whole import write_whole
from fastgrpo.records.grids import png, to_uint8

# an image up to this side is kept to the pixel, a larger one as a JPEG that is at most _LARGEST
_EXACT = 128
_LARGEST = 256


@dataclass(frozen=True)
class Shown:
    """One image of an evaluation; ``scores`` by reward, None for one that is not finite."""

    path: Path
    prompt: str
    scores: dict[str, float | None]
    verified: bool | None


@dataclass(frozen=True)
class Gallery:
    """The images of the evaluation after ``iteration``; ``statistics`` by reward, of all images that were judged."""

    iteration: int
    images: tuple[Shown, ...]
    statistics: dict[str, dict[str, float | None]]


def save_gallery(images: Path, iteration: int, result: EvaluationResult) -> Path:
    """Write the images that an evaluation kept, below a run's ``images``; returns their directory."""
    directory = images / f"evaluation_{iteration:06d}"
    directory.mkdir(exist_ok=True)
    entries = []
    for place, (image_CHW, prompt) in enumerate(zip(result.images, result.texts, strict=True)):
        suffix, content = _encoded(to_uint8(image_CHW))
        write_whole(directory / f"{place:02d}{suffix}", content)
        entries.append(
            {
                "file": f"{place:02d}{suffix}",
                "prompt": prompt,
                "scores": {name: _finite(scores_PG[place, 0]) for name, scores_PG in result.scores.items()},
                "verified": None if result.verified is None else bool(result.verified[place]),
            }
        )
    said = {name: _all_finite(statistics(scores_PG)) for name, scores_PG in result.scores.items()}
    text = json.dumps({"iteration": iteration, "rewards": said, "images": entries}, indent=1, ensure_ascii=False)
    # written last, it says that the images are whole
    write_whole(directory / "scores.json", text.encode())
    return directory


def read_galleries(images: Path) -> list[Gallery]:
    """Those below a run's ``images``, by iteration; what is not whole is left out."""
    found = [_read(path.parent) for path in sorted(images.glob("evaluation_*/scores.json"))]
    return sorted((gallery for gallery in found if gallery is not None), key=lambda gallery: gallery.iteration)


def _read(directory: Path) -> Gallery | None:
    try:
        said: Any = json.loads((directory / "scores.json").read_text(encoding="utf-8"))
        images = tuple(
            # a file's name, wherever it says that it lies
            Shown(directory / Path(entry["file"]).name, str(entry["prompt"]), dict(entry["scores"]), entry["verified"])
            for entry in said["images"]
        )
        return Gallery(int(said["iteration"]), images, dict(said["rewards"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _encoded(pixels_HWC: np.ndarray) -> tuple[str, bytes]:
    image = Image.fromarray(pixels_HWC)
    if max(image.size) <= _EXACT:
        return ".png", png(image)
    image.thumbnail((_LARGEST, _LARGEST), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=88)
    return ".jpg", buffer.getvalue()


def _finite(value: Tensor) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def _all_finite(values: dict[str, float | None]) -> dict[str, float | None]:
    return {name: value if value is not None and math.isfinite(value) else None for name, value in values.items()}
