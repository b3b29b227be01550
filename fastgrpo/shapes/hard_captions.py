"""Captions that are hard for the shipped model: more objects, groups and relations than it has ever been shown.

Which of these candidates are trained on and which are held out, the files prompts/hard_*.txt say: they were chosen by how
seldom the model draws them right, ``python -m benchmarks.rare_success.success``.
"""

import numpy as np

from fastgrpo.shapes.world import COLORS, LARGE_COUNTS, RELATIONS, SHAPES, Caption

# begin and end of the text are two more tokens, of the 12 that the shipped model reads
MAX_WORDS = 10
_SEED = 2511
# objects of each group
_FORMS = (
    ((4,),),
    ((5,),),
    ((1, 2), (2, 1)),
    ((1, 3), (3, 1), (2, 2)),
    ((2, 3), (3, 2)),
    ((3, 3),),
    ((1, 1, 1),),
    ((2, 1, 1), (1, 2, 1), (1, 1, 2)),
    ((2, 2, 1), (2, 1, 2), (1, 2, 2)),
)


def num_words(caption: Caption) -> int:
    """Tokens of the shipped tokenizer: a word is one, but the large counts are spelled in letters."""
    words = str(caption).split()
    return sum(len(word) if word in LARGE_COUNTS else 1 for word in words)


def hard_candidates(num_of_each_form: int = 24) -> list[Caption]:
    """Captions of nine forms that the shipped model can read; of the forms of one kind all 12."""
    generator = np.random.default_rng(_SEED)
    kinds = [(color, shape) for color in COLORS for shape in SHAPES]
    captions: dict[Caption, None] = {}
    for form in _FORMS:
        of_form: dict[Caption, None] = {}
        while len(of_form) < (len(kinds) if len(form[0]) == 1 else num_of_each_form):
            sizes = form[int(generator.integers(len(form)))]
            chosen = generator.choice(len(kinds), size=len(sizes), replace=False)
            relations = generator.choice(RELATIONS, size=len(sizes) - 1)
            objects = [kinds[kind] for kind, size in zip(chosen, sizes, strict=True) for _ in range(size)]
            caption = Caption(tuple(objects), *map(str, relations))
            if num_words(caption) <= MAX_WORDS:
                of_form[caption] = None
        captions |= of_form
    return list(captions)
