"""Images before and after: a card a prompt, in it a pair for each run, and one slider through all evaluations.

Images are written into the page once each, as data: the page's script shows those of the evaluation that the slider
is at, for each run the newest one up to there.
"""

import base64
import mimetypes
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastgrpo.records.gallery import Gallery, Shown
from fastgrpo.report.headline import main_score
from fastgrpo.report.run import Run, number

# of all runs' images together, before base64 makes a third more of them
MOST_BYTES = 3 * 2**20
# a run of an earlier version has grids of all images alone
ALL_PROMPTS = "all prompts"


@dataclass(frozen=True)
class GalleryPage:
    """``cards``: prompt and numbers of the runs that have it.  ``data`` is what the script reads, plain JSON."""

    cards: list[tuple[str, list[int]]]
    data: dict[str, Any]
    remarks: list[str]
    is_grid: bool


@dataclass
class _Gallery:
    """``cards[prompt, n][run]`` are [iteration, image, scores, verified] of a prompt that may be given n times."""

    cards: dict[tuple[str, int], dict[int, list[list[Any]]]] = field(default_factory=dict)
    images: list[str] = field(default_factory=list)
    numbers: dict[str, int] = field(default_factory=dict)

    def add(self, run: int, gallery: Gallery) -> None:
        seen: Counter[str] = Counter()
        for shown in gallery.images:
            self._add(run, gallery.iteration, shown, seen[shown.prompt])
            seen[shown.prompt] += 1

    def _add(self, run: int, iteration: int, shown: Shown, occurrence: int) -> None:
        uri = _data_uri(shown.path)
        if uri not in self.numbers:
            self.numbers[uri] = len(self.images)
            self.images.append(uri)
        entries = self.cards.setdefault((shown.prompt, occurrence), {}).setdefault(run, [])
        scores = {name: number(score) for name, score in shown.scores.items()}
        entries.append([iteration, self.numbers[uri], scores, shown.verified])


def gallery_page(runs: Sequence[Run], most_bytes: int = MOST_BYTES) -> GalleryPage:
    """As many evaluations and prompts of each run as ``most_bytes`` allow; what was left out is remarked."""
    gallery, remarks = _Gallery(), []
    has_galleries = any(run.galleries for run in runs)
    for place, run in enumerate(runs):
        kept, said = _kept(run, run.galleries if has_galleries else _grids(run), most_bytes // len(runs))
        if has_galleries and not kept and run.evaluated:
            said = f"its images were not kept one by one; grids of them are in {run.directory.images}"
        remarks += [f"{run.name}: {said}" if len(runs) > 1 else said] * bool(said)
        for one in kept:
            gallery.add(place, one)
    steps = sorted({entry[0] for card in gallery.cards.values() for found in card.values() for entry in found})
    cards = [(prompt, sorted(card)) for (prompt, _), card in gallery.cards.items()]
    data = {
        "steps": steps,
        "images": gallery.images,
        "cards": [{str(run): entries for run, entries in card.items()} for card in gallery.cards.values()],
    }
    return GalleryPage(cards, data, remarks, is_grid=not has_galleries)


def _kept(run: Run, galleries: Sequence[Gallery], most_bytes: int) -> tuple[list[Gallery], str]:
    """The first, the last and the best evaluation, others evenly between them; and what of it was left out."""
    galleries = [_with_files(gallery) for gallery in galleries]
    galleries = [gallery for gallery in galleries if gallery.images]
    sizes = [sum(shown.path.stat().st_size for shown in gallery.images) for gallery in galleries]
    if sum(sizes) <= most_bytes:
        return galleries, ""
    num = max(2, int(most_bytes // (sum(sizes) / len(sizes))))
    places = {round(place) for place in np.linspace(0, len(galleries) - 1, num)}
    if num > 2 and (best := _best(run, galleries)) is not None:
        places.add(best)
    kept = [galleries[place] for place in sorted(places)]
    size = sum(sizes[place] for place in places)
    num_prompts = max(len(gallery.images) for gallery in kept)
    most_prompts = max(1, int(num_prompts * min(1.0, most_bytes / size)))
    kept = [Gallery(one.iteration, one.images[:most_prompts], one.statistics) for one in kept]
    said = f"{len(kept)} of {len(galleries)} evaluations"
    if most_prompts < num_prompts:
        said += f" and {most_prompts} of {num_prompts} prompts"
    return kept, f"{said} are shown, so that the page stays small; all are in {run.directory.images}"


def _best(run: Run, galleries: Sequence[Gallery]) -> int | None:
    metric = main_score(run)
    values = {places.get("iteration"): value for places, value in run.points(metric)} if metric else {}
    known = [place for place, gallery in enumerate(galleries) if gallery.iteration in values]
    return max(known, key=lambda place: values[galleries[place].iteration], default=None)


def _with_files(gallery: Gallery) -> Gallery:
    images = tuple(shown for shown in gallery.images if shown.path.is_file())
    return Gallery(gallery.iteration, images, gallery.statistics)


def _grids(run: Run) -> list[Gallery]:
    """Of a run whose images were not kept one by one: the grids, as one image each."""
    found = [(re.fullmatch(r"evaluation_(\d+)\.png", path.name), path) for path in run.directory.images.glob("*.png")]
    grids = sorted((int(match[1]), path) for match, path in found if match)
    shown = [(iteration, Shown(path, ALL_PROMPTS, {}, None)) for iteration, path in grids if iteration in run.evaluated]
    return [Gallery(iteration, (one,), {}) for iteration, one in shown]


def _data_uri(path: Path) -> str:
    kind = mimetypes.guess_type(path.name)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
