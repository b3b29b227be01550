"""The verifier as it first was, in plain permutations: what captions of three objects and fewer are compared with."""

from itertools import permutations

import numpy as np

from fastgrpo.shapes.verifier import Found, find_objects
from fastgrpo.shapes.world import Caption


def verify(image_HWC: np.ndarray, caption: Caption) -> tuple[float, float]:
    found = find_objects(image_HWC)
    wanted = caption.kinds
    num_slots = max(len(found), len(wanted))
    if not found:
        return 0.0, 0.0
    best_graded, best_strict = 0.0, 0.0
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
    if item is None:
        return 0.0, False
    color, shape = kind
    right_shape = item.shape == shape and item.area <= 400
    form = np.clip((item.overlap[shape] - 0.5) / (0.78 - 0.5), 0.0, 1.0) * (1.0 if right_shape else 0.3)
    score = (0.5 + 0.5 * form) if item.color == color else 0.3 * form
    return float(score), item.color == color and right_shape and item.overlap[shape] >= 0.78


def _relation(relation: str | None, items: list[Found | None]) -> float:
    if relation is None:
        return 1.0
    first, second = items
    if first is None or second is None:
        return 0.0
    step = second.x - first.x if relation == "left of" else second.y - first.y
    return float(np.clip((step + 6.0) / 12.0, 0.0, 1.0))
