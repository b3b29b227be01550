"""Pictures of one color, for tests of what is drawn around them."""

import numpy as np


def gray(side: int, shade: int = 90) -> np.ndarray:
    """A square image [H, W, C]."""
    return np.full((side, side, 3), shade, dtype=np.uint8)
