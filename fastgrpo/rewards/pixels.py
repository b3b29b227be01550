"""Images as files and readers on the CPU want them.  Letters: B images, C H W of an image."""

import numpy as np
import torch
from torch import Tensor


def to_bytes(images_BCHW: Tensor) -> np.ndarray:
    """Bytes [B, H, W, C] of images in [0, 1]: round(255 * value), half to even; waits for a GPU."""
    pixels_BCHW = (images_BCHW.float() * 255).round().clamp(0, 255).to(torch.uint8)
    return pixels_BCHW.permute(0, 2, 3, 1).contiguous().cpu().numpy()
