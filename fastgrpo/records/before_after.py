"""The images of the first evaluation beside those of the last: what was won, and what was lost.

    before_after.png       the pairs that gained most reward, and those that lost most
    before_after_all.png   all pairs

The first evaluation's images are kept in ``.first.npz``, for evaluations after a resumption too.
"""

import io
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastgrpo.files.whole import write_whole
from fastgrpo.records.grids import draw_before_after, png

MOST_GAINED, MOST_LOST = 9, 3
_ABOUT = "about"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shown:
    """Images of an evaluation [H, W, C] (uint8), with their prompts; totals and verdicts where there are any."""

    images: Sequence[np.ndarray]
    prompts: Sequence[str]
    totals: Sequence[float] | None = None
    verified: Sequence[bool] | None = None

    def of(self, places: Sequence[int]) -> "Shown":
        """Some of them."""
        return Shown(
            images=[self.images[place] for place in places],
            prompts=[self.prompts[place] for place in places],
            totals=[self.totals[place] for place in places] if self.totals is not None else None,
            verified=[self.verified[place] for place in places] if self.verified is not None else None,
        )


def write_before_after(directory: Path, now: Shown) -> Image.Image:
    """Draw both pictures of this evaluation and the first, which is this one if there was none before.

    Returns the one of those that changed most.
    """
    first = _first(directory, now)
    everything = list(range(len(now.prompts)))
    _write(directory / "before_after_all.png", first, now, everything, "")
    chosen = choose(first.totals, now.totals) if first.totals and now.totals else everything[: MOST_GAINED + MOST_LOST]
    shown = chosen or everything[:MOST_GAINED]
    return _write(directory / "before_after.png", first, now, shown, _caption(first, now, chosen))


def choose(before: Sequence[float], after: Sequence[float]) -> list[int]:
    """Places of those that gained most, the most first, then of those that lost most."""
    gains = [b - a for a, b in zip(before, after, strict=True)]
    # of equal gains the better image
    order = sorted(range(len(gains)), key=lambda place: (-gains[place], -after[place]))
    gained = [place for place in order if gains[place] > 0][:MOST_GAINED]
    lost = [place for place in reversed(order) if gains[place] < 0][:MOST_LOST]
    return gained + lost


def _caption(first: Shown, now: Shown, chosen: Sequence[int]) -> str:
    if first.totals is None or now.totals is None:
        return "All pairs: before_after_all.png."
    pairs = list(zip(first.totals, now.totals, strict=True))
    gained, lost = sum(b > a for a, b in pairs), sum(b < a for a, b in pairs)
    said = f"Of {len(pairs)} pairs {gained} gained reward and {lost} lost some"
    if first.verified is not None and now.verified is not None:
        verdicts = list(zip(first.verified, now.verified, strict=True))
        said += f"; {sum(b and not a for a, b in verdicts)} became right, {sum(a and not b for a, b in verdicts)} wrong"
    shown = (min(gained, MOST_GAINED), min(lost, MOST_LOST))
    which = f"here the {shown[0]} that gained and the {shown[1]} that lost most" if chosen else "here the first ones"
    return f"{said}: {which}, all in before_after_all.png. The number is the reward of the image."


def _write(path: Path, first: Shown, now: Shown, places: Sequence[int], caption: str) -> Image.Image:
    a, b = first.of(places), now.of(places)
    both_scored = a.totals is not None and b.totals is not None
    both_marked = a.verified is not None and b.verified is not None
    page = draw_before_after(
        a.images,
        b.images,
        b.prompts,
        verified=(a.verified, b.verified) if both_marked else (None, None),
        scores=(a.totals, b.totals) if both_scored else (None, None),
        caption=caption,
    )
    write_whole(path, png(page))
    return page


def _first(directory: Path, now: Shown) -> Shown:
    kept = _read(directory)
    if kept is not None and list(kept.prompts) == list(now.prompts):
        return kept
    if kept is not None:
        _log.warning("evaluation prompts have changed: before_after.png starts anew")
    file = io.BytesIO()
    about = {key: value for key, value in asdict(now).items() if key != "images"}
    encoded = np.frombuffer(json.dumps(about, default=list).encode(), dtype=np.uint8)
    np.savez(file, *now.images, about=encoded)
    write_whole(directory / ".first.npz", file.getvalue())
    # of a run that an earlier version began
    (directory / ".first.json").unlink(missing_ok=True)
    return now


def _read(directory: Path) -> Shown | None:
    pixels, texts, earlier = (directory / f".first.{kind}" for kind in ("npz", "json", "npy"))
    if pixels.exists():
        with np.load(pixels, allow_pickle=False) as kept:
            images = [kept[name] for name in kept if name != _ABOUT]
            if _ABOUT in kept:
                about: dict[str, Any] = json.loads(kept[_ABOUT].tobytes())
                return Shown(images=images, **about)
    elif earlier.exists():
        images = list(np.load(earlier, allow_pickle=False))
    else:
        return None
    # earlier versions wrote the prompts last, to say that the images are whole
    return Shown(images, json.loads(texts.read_text(encoding="utf-8"))) if texts.exists() else None
