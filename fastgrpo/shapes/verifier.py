"""The verifier: does an image of the shapes world show what its caption says?  GenEval in miniature.

Pixels are segmented by color, connected components become objects, and each object is compared with ideal circles,
squares and triangles of its own area and centroid.  Two answers come out:

    strict   1 if the objects are exactly those of the caption, in the right relation, else 0
    graded   in [0, 1]: what share of the caption is there, 1 wherever strict is 1

Segmentation follows GenEval (arXiv:2310.11513) in spirit: object, color, count and position are checked one by one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, pairwise, permutations

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
    overlap: dict[str, float] = {}
    for shape in SHAPES:
        ideal = coverage(shape, x, y, float(np.sqrt(area / np.pi))) >= 0.5
        common = int(np.count_nonzero(mask & ideal))
        overlap[shape] = common / (area + int(np.count_nonzero(ideal)) - common)
    return overlap


def verify(image_HWC: np.ndarray, caption: Caption) -> tuple[float, float]:
    """(graded, strict) of one image [H, W, 3] in [0, 1] against its caption.

    Graded is that of the best choice of found objects for the wanted ones: the mean of how well each matches, over the
    wanted or, if they are more, the found ones, times a half and half the share of its relations that hold.  A relation
    between groups is judged for every pair of their objects.
    """
    found = find_objects(image_HWC)
    wanted = caption.kinds
    if not found:
        return 0.0, 0.0
    matches = {kind: [_match(item, kind) for item in found] for kind in set(wanted)}
    best = [max(of_kind[i][0] for of_kind in matches.values()) for i in range(len(found))]
    # further objects only lower the score through the number found
    num_candidates = 4 if len(wanted) <= 3 else len(wanted) + 2
    candidates = sorted(range(len(found)), key=lambda i: -best[i])[:num_candidates]
    # a place that nothing fills matches nothing and lies nowhere
    empty = max(len(wanted) - len(candidates), 0)
    places = [found[i] for i in candidates]
    choices_CW = _choices(len(candidates) + empty, caption.sizes)
    score_C, exact_C = np.zeros(len(choices_CW)), np.full(len(choices_CW), len(found) == len(wanted))
    for place_C, kind in zip(choices_CW.T, wanted, strict=True):
        score_C = score_C + np.array([*(matches[kind][i][0] for i in candidates), *[0.0] * empty])[place_C]
        exact_C &= np.array([*(matches[kind][i][1] for i in candidates), *[False] * empty])[place_C]
    relation_C, holds_C = _relations(places, empty, choices_CW, caption)
    graded = float((score_C / max(len(found), len(wanted)) * (0.5 + 0.5 * relation_C)).max())
    strict = bool((exact_C & holds_C).any())
    return (1.0 if strict else min(graded, 0.99)), float(strict)


@lru_cache(maxsize=256)
def _choices(num_places: int, sizes: tuple[int, ...]) -> np.ndarray:
    """Every way [C, W] to choose places for the wanted objects; of more than three, in one order within each group."""
    num_wanted = sum(sizes)
    # in every order of few: the last bit of a sum depends on it, and the scores of these captions are to stay
    if num_wanted <= 3:
        return np.array(list(permutations(range(num_places), num_wanted)))
    ways: list[tuple[int, ...]] = [()]
    for size in sizes:
        ways = [
            (*way, *more)
            for way in ways
            for more in combinations([place for place in range(num_places) if place not in way], size)
        ]
    return np.array(ways)


def _relations(
    places: Sequence[Found], empty: int, choices_CW: np.ndarray, caption: Caption
) -> tuple[np.ndarray, np.ndarray]:
    """The mean over relations of the mean over pairs of objects [C], and whether all of them hold [C]."""
    mean_C, holds_C = np.ones(len(choices_CW)), np.ones(len(choices_CW), dtype=bool)
    if not caption.relations:
        return mean_C, holds_C
    ends = np.cumsum((0, *caption.sizes))
    groups = [range(first, last) for first, last in pairwise(ends.tolist())]
    total_C = np.zeros(len(choices_CW))
    for relation, (before, after) in zip(caption.relations, pairwise(groups), strict=True):
        held = np.zeros((len(places) + empty,) * 2)
        at = np.array([item.x if relation == "left of" else item.y for item in places])
        step = at[None, :] - at[:, None]
        held[: len(at), : len(at)] = np.clip((step + _RELATION_MARGIN) / (2 * _RELATION_MARGIN), 0.0, 1.0)
        pairs_CR = np.stack([held[choices_CW[:, i], choices_CW[:, j]] for i in before for j in after], axis=1)
        total_C += pairs_CR.sum(axis=1) / pairs_CR.shape[1]
        holds_C &= (pairs_CR == 1.0).all(axis=1)
    return total_C / len(caption.relations), holds_C


def _match(item: Found, kind: tuple[str, str]) -> tuple[float, bool]:
    """How well an object is of a (color, shape): graded in [0, 1], and whether exactly."""
    color, shape = kind
    right_shape = item.shape == shape and item.area <= _MAX_AREA
    form = min(max((item.overlap[shape] - 0.5) / (_MIN_OVERLAP - 0.5), 0.0), 1.0) * (1.0 if right_shape else 0.3)
    score = (0.5 + 0.5 * form) if item.color == color else 0.3 * form
    return score, item.color == color and right_shape and item.overlap[shape] >= _MIN_OVERLAP
