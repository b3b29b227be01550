"""Which captions are trained on, which are held out, and how a caption goes wrong.

The split belongs to the world, not to a run: the shipped model, its scorer and every reinforcement run keep to it.
"""

import numpy as np

from fastgrpo.shapes.world import COLORS, COUNTS, SHAPES, Caption, all_captions

_SPLIT_SEED = 2510
_HELD_OUT_ONE_KIND, _HELD_OUT_TWO_KINDS = 8, 56


def held_out_captions() -> list[Caption]:
    """64 captions that no training has seen: 8 of one kind, 56 of two."""
    captions = all_captions()
    shuffled = np.random.default_rng(_SPLIT_SEED).permutation
    one = [c for c in captions if c.relation is None]
    two = [c for c in captions if c.relation is not None]
    picked_one = sorted(shuffled(len(one))[:_HELD_OUT_ONE_KIND])
    picked_two = sorted(shuffled(len(two))[:_HELD_OUT_TWO_KINDS])
    return [one[i] for i in picked_one] + [two[i] for i in picked_two]


def training_captions() -> list[Caption]:
    """The other 236 captions, in the world's order."""
    held_out = set(held_out_captions())
    return [caption for caption in all_captions() if caption not in held_out]


def misread(caption: Caption, generator: np.random.Generator) -> Caption:
    """The caption with one thing wrong: a color, a shape, the count or the relation."""
    kinds, relation = list(caption.kinds), caption.relation
    fault = generator.choice(["color", "shape", "count" if relation is None else "relation"])
    which = int(generator.integers(len(kinds)))
    color, shape = kinds[which]
    if fault == "color":
        wrong = (str(generator.choice([c for c in COLORS if c != color])), shape)
    elif fault == "shape":
        wrong = (color, str(generator.choice([s for s in SHAPES if s != shape])))
    elif fault == "count":
        count = int(generator.choice([n for n in COUNTS.values() if n != len(kinds)]))
        return Caption((kinds[0],) * count)
    else:
        return Caption((kinds[1], kinds[0]), relation)
    return Caption(tuple(wrong if relation is None or i == which else kind for i, kind in enumerate(kinds)), relation)
