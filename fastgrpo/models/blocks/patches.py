"""From latents to tokens and back: a token holds the pixels of one patch.

Two orders of a token's numbers occur: channels first, [C, p, p], and channels last, [p, p, C].
Letters: B samples, C H W latent channels, height and width, L tokens, p side of a patch.
"""

from torch import Tensor


def patched(x_BCHW: Tensor, side: int = 2, *, channels_last: bool = False) -> Tensor:
    """[B, C, H, W] -> [B, (H / p) (W / p), C p p]."""
    x = x_BCHW.unflatten(3, (-1, side)).unflatten(2, (-1, side))
    return x.permute(0, 2, 4, *((3, 5, 1) if channels_last else (1, 3, 5))).flatten(3).flatten(1, 2)


def unpatched(x_BLC: Tensor, height: int, width: int, side: int = 2, *, channels_last: bool = False) -> Tensor:
    """[B, (H / p) (W / p), C p p] -> [B, C, H, W]."""
    order, places = ((side, side, -1), (5, 1, 3, 2, 4)) if channels_last else ((-1, side, side), (3, 1, 4, 2, 5))
    x = x_BLC.unflatten(2, order).unflatten(1, (height // side, width // side))
    return x.permute(0, *places).reshape(len(x), -1, height, width)
