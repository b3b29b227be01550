"""Captions that are hard for the shipped model: more objects, groups and relations than it has ever been shown.

Which of these candidates are trained on and which are held out, the files prompts/hard_*.txt say: they were chosen by
how seldom the model draws them right, ``python -m benchmarks.rare_success.success``.
"""

from pathlib import Path

import numpy as np

from fastgrpo.shapes.world import COLORS, LARGE_COUNTS, RELATIONS, SHAPES, Caption, parse_caption

# begin and end of the text are two more tokens, of the 12 that the shipped model reads
MAX_WORDS = 10
_SEED = 2511
_PROMPTS = Path(__file__).parent / "prompts"
# (how many captions, objects of each group)
_FORMS = (
    (12, ((4,),)),
    (12, ((5,),)),
    (24, ((1, 2), (2, 1))),
    (24, ((1, 3), (3, 1), (2, 2))),
    (24, ((2, 3), (3, 2))),
    (24, ((3, 3),)),
    (24, ((1, 1, 1),)),
    (24, ((2, 1, 1), (1, 2, 1), (1, 1, 2))),
    (24, ((2, 2, 1), (2, 1, 2), (1, 2, 2))),
    # more of those that the shipped model draws right now and then
    (64, ((2, 1),)),
)


def num_words(caption: Caption) -> int:
    """Tokens of the shipped tokenizer: a word is one, but the large counts are spelled in letters."""
    words = str(caption).split()
    return sum(len(word) if word in LARGE_COUNTS else 1 for word in words)


def hard_captions() -> tuple[list[Caption], list[Caption]]:
    """Those trained on and those held out: ``prompts=shapes_hard``."""
    train, held_out = (
        [parse_caption(line) for line in (_PROMPTS / f"hard_{part}.txt").read_text().splitlines()]
        for part in ("train", "held_out")
    )
    return train, held_out


def hard_candidates() -> list[Caption]:
    """Captions of nine forms that the shipped model can read."""
    generator = np.random.default_rng(_SEED)
    kinds = [(color, shape) for color in COLORS for shape in SHAPES]
    captions: dict[Caption, None] = {}
    for number, form in _FORMS:
        end = len(captions) + number
        while len(captions) < end:
            sizes = form[int(generator.integers(len(form)))]
            chosen = generator.choice(len(kinds), size=len(sizes), replace=False)
            relations = generator.choice(RELATIONS, size=len(sizes) - 1)
            objects = [kinds[kind] for kind, size in zip(chosen, sizes, strict=True) for _ in range(size)]
            caption = Caption(tuple(objects), *map(str, relations))
            if num_words(caption) <= MAX_WORDS:
                captions[caption] = None
    return list(captions)
