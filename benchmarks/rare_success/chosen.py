"""What is chosen by how often the base model draws a caption right: the hard prompts, and bands of prompts."""

from collections.abc import Mapping

import numpy as np

from fastgrpo.shapes.captions import training_captions
from fastgrpo.shapes.hard_captions import hard_candidates
from fastgrpo.shapes.world import Caption

Totals = Mapping[str, tuple[int, int]]

SEED = 2512
HARD_BELOW = 0.01
# of each form: trained on and held out
NUM_HARD = {
    "4 equal objects": (5, 2),
    "5 equal objects": (5, 2),
    "two groups of 3 objects": (40, 12),
    "two groups of 4 objects": (12, 4),
    "two groups of 5 objects": (12, 4),
    "chain of 3 objects": (12, 4),
    "chain of 4 objects": (6, 2),
    "chain of 5 objects": (4, 2),
}
BANDS = {"<1%": (0.0, 0.01), "1-5%": (0.01, 0.05), "5-20%": (0.05, 0.20), "20-50%": (0.20, 0.50)}
NUM_IN_BAND = 24


def choose_hard(totals: Totals) -> tuple[list[Caption], list[Caption]]:
    """Trained on and held out: candidates seen to succeed in less than 1%, of each form those that ever did first.

    Which of a form's are held out is drawn by a seed, so that both parts are as hard.  ValueError where a form has too
    few captions below 1%.
    """
    generator = np.random.default_rng(SEED)
    train: list[Caption] = []
    held_out: list[Caption] = []
    for form, (num_train, num_held_out) in NUM_HARD.items():
        found = [c for c in hard_candidates() if c.form == form and _rate(totals, c) < HARD_BELOW]
        # sorted keeps the candidates' order among equals
        found = sorted(found, key=lambda c: -_rate(totals, c))[: num_train + num_held_out]
        if len(found) < num_train + num_held_out:
            raise ValueError(f"only {len(found)} captions of form {form!r} lie below 1%; measure more candidates")
        places = set(generator.permutation(len(found))[:num_held_out].tolist())
        train += [c for i, c in enumerate(found) if i not in places]
        held_out += [c for i, c in enumerate(found) if i in places]
    return train, held_out


def choose_bands(totals: Totals) -> dict[str, list[str]]:
    """Up to 24 prompts of each band of success: easy ones to train on, and hard candidates that are not held out.

    Below 1%, those that succeed most often: of the others nobody knows whether they ever do.
    """
    generator = np.random.default_rng(SEED)
    train, held_out = choose_hard(totals)
    others = [c for c in hard_candidates() if c not in train and c not in held_out]
    bands = {}
    for band, (low, high) in BANDS.items():
        found = [str(c) for c in (*training_captions(), *train, *others) if low <= _rate(totals, c) < high]
        if low == 0.0:
            found = sorted(found, key=lambda text: -totals[text][0] / totals[text][1])[:NUM_IN_BAND]
        else:
            found = [found[i] for i in sorted(generator.permutation(len(found))[:NUM_IN_BAND].tolist())]
        bands[band] = found
    return bands


def _rate(totals: Totals, caption: Caption) -> float:
    """Share of images; of a caption that was never measured, as if all were right."""
    successes, images = totals.get(str(caption), (1, 1))
    return successes / images
