"""The verifier: does an image of the shapes world show what its caption says?  GenEval in miniature.

Pixels are segmented by color, connected components become objects, and each object is compared with ideal circles,
squares and triangles of its own area and centroid.  Two answers come out:

    strict   1 if the objects are exactly those of the caption, in the right relation, else 0
    graded   in [0, 1]: what share of the caption is there, 1 wherever strict is 1

Segmentation follows GenEval (arXiv:2310.11513) in spirit: object, color, count and position are checked one by one.
"""

from dataclasses import dataclass
from itertools import permutations

import numpy as np
from scipy import ndimage

from fastgrpo.shapes.world import BACKGROUND, COLORS, SHAPES, Caption, coverage

# a pixel belongs to an object when it lies at least half the way from the background to a color, within this angle
_MIN_BLEND = 0.5
_MIN_COSINE = 0.93
# smaller components are specks: the smallest drawn object covers 130 pixels
_MIN_AREA = 30
# and the largest covers 227: a frame full of red is not a red square
_MAX_AREA = 400
# overlap with the ideal shape; drawn and reconstructed objects lie above 0.9
_MIN_OVERLAP = 0.78
_RELATION_MARGIN = 6.0

_NAMES = tuple(COLORS)
_DIRECTIONS = np.array([COLORS[name] for name in _NAMES], dtype=np.float32) - np.array(BACKGROUND, dtype=np.float32)
_LENGTHS = np.linalg.norm(_DIRECTIONS, axis=1)


@dataclass(frozen=True)
class Found:
    """One object seen in an image; ``overlap`` is its intersection over union with each ideal shape."""

    color: str
    x: float
    y: float
    area: int
    overlap: dict[str, float]

    @property
    def shape(self) -> str:
        return max(self.overlap, key=self.overlap.__getitem__)


def find_objects(image_HWC: np.ndarray) -> list[Found]:
    """The objects in an image [H, W, 3] in [0, 1], larger than a speck."""
    difference = image_HWC.astype(np.float32) - np.array(BACKGROUND, dtype=np.float32)
    along = difference @ _DIRECTIONS.T / _LENGTHS
    color = along.argmax(axis=-1)
    best = np.take_along_axis(along, color[..., None], axis=-1)[..., 0]
    is_object = (best >= _MIN_BLEND * _LENGTHS[color]) & (best >= _MIN_COSINE * np.linalg.norm(difference, axis=-1))
    found = []
    num_pixels = np.bincount(color[is_object], minlength=len(_NAMES))
    for index, name in enumerate(_NAMES):
        if num_pixels[index] < _MIN_AREA:
            continue
        labels, _ = ndimage.label(is_object & (color == index))
        for label, area in enumerate(np.bincount(labels.ravel())[1:].tolist(), start=1):
            if area >= _MIN_AREA:
                mask = labels == label
                rows, columns = np.nonzero(mask)
                x, y = float(columns.mean()) + 0.5, float(rows.mean()) + 0.5
                found.append(Found(name, x, y, area, _overlap(mask, x, y, area)))
    return found


def _overlap(mask: np.ndarray, x: float, y: float, area: int) -> dict[str, float]:
    overlap = {}
    for shape in SHAPES:
        ideal = coverage(shape, x, y, float(np.sqrt(area / np.pi))) >= 0.5
        common = int(np.count_nonzero(mask & ideal))
        overlap[shape] = common / (area + int(np.count_nonzero(ideal)) - common)
    return overlap


def verify(image_HWC: np.ndarray, caption: Caption) -> tuple[float, float]:
    """(graded, strict) of one image [H, W, 3] in [0, 1] against its caption."""
    found = find_objects(image_HWC)
    wanted = caption.kinds
    num_slots = max(len(found), len(wanted))
    if not found:
        return 0.0, 0.0
    best_graded, best_strict = 0.0, 0.0
    # at most three objects are wanted; further ones only lower the score through num_slots
    candidates = sorted(found, key=lambda item: -max(_match(item, kind)[0] for kind in wanted))[:4]
    slots: list[Found | None] = [*candidates, *[None] * len(wanted)]
    for chosen in set(permutations(range(len(slots)), len(wanted))):
        pairs = [(slots[i], kind) for i, kind in zip(chosen, wanted, strict=True)]
        matches = [_match(item, kind) for item, kind in pairs]
        relation = _relation(caption.relation, [item for item, _ in pairs])
        graded = sum(score for score, _ in matches) / num_slots * (0.5 + 0.5 * relation)
        strict = len(found) == len(wanted) and all(exact for _, exact in matches) and relation == 1.0
        best_graded, best_strict = max(best_graded, graded), max(best_strict, float(strict))
    return (1.0 if best_strict else min(best_graded, 0.99)), best_strict


def _match(item: Found | None, kind: tuple[str, str]) -> tuple[float, bool]:
    """How well an object is of a (color, shape): graded in [0, 1], and whether exactly."""
    if item is None:
        return 0.0, False
    color, shape = kind
    right_shape = item.shape == shape and item.area <= _MAX_AREA
    form = np.clip((item.overlap[shape] - 0.5) / (_MIN_OVERLAP - 0.5), 0.0, 1.0) * (1.0 if right_shape else 0.3)
    score = (0.5 + 0.5 * form) if item.color == color else 0.3 * form
    return float(score), item.color == color and right_shape and item.overlap[shape] >= _MIN_OVERLAP


def _relation(relation: str | None, items: list[Found | None]) -> float:
    """1 where the relation holds by the margin, falling to 0 over the same distance on the wrong side."""
    if relation is None:
        return 1.0
    first, second = items
    if first is None or second is None:
        return 0.0
    step = second.x - first.x if relation == "left of" else second.y - first.y
    return float(np.clip((step + _RELATION_MARGIN) / (2 * _RELATION_MARGIN), 0.0, 1.0))
