"""Fewer points of a long curve, which looks as it did: the least and the greatest of each stretch are kept."""

import numpy as np


def thinned(values: np.ndarray, most: int) -> np.ndarray:
    """Indices, in order, of at most ``most`` >= 4 finite values: the first, the last, and the extremes of stretches."""
    if most < 4:
        raise ValueError(f"a curve needs 4 points to keep its ends and its extremes, got {most}; allow more")
    if len(values) <= most:
        return np.arange(len(values))
    stretches = np.array_split(np.arange(len(values)), (most - 2) // 2)
    extremes = [stretch[np.argmin(values[stretch])] for stretch in stretches]
    extremes += [stretch[np.argmax(values[stretch])] for stretch in stretches]
    return np.unique(np.array([0, *extremes, len(values) - 1]))
