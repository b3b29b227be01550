"""Rotary embeddings: each pair of neighbouring channels of a query or key is turned by its token's angle.

    (a, b) -> (a cos - b sin, a sin + b cos)                                              arXiv:2104.09864

Letters: B samples, N tokens, H heads, D width of a head.
"""

import torch
from torch import Tensor

# cosines and sines [N, D] or [B, N, D] of the angles, each pair's first sine negated
Rotation = tuple[Tensor, Tensor]


def rotation(cos_ND: Tensor, sin_ND: Tensor) -> Rotation:
    """Of cosines and sines that both channels of a pair have, as diffusers' ``get_1d_rotary_pos_embed`` gives them."""
    return cos_ND, torch.stack([-sin_ND[..., ::2], sin_ND[..., 1::2]], dim=-1).flatten(-2)


def complex_rotation(turns_NE: Tensor) -> Rotation:
    """Of one complex number exp(i angle) a pair, E = D / 2."""
    return rotation(turns_NE.real.repeat_interleave(2, dim=-1), turns_NE.imag.repeat_interleave(2, dim=-1))


def rotated(x_BNHD: Tensor, rotation: Rotation) -> Tensor:
    cos_N1D, sin_N1D = (part_ND.unsqueeze(-2) for part_ND in rotation)
    exact_BNHD = x_BNHD.to(torch.promote_types(x_BNHD.dtype, torch.float32))
    # the sines have the signs: swapping is no tensor of its own once it is compiled, concatenating would be
    swapped_BNHD = exact_BNHD.unflatten(3, (-1, 2)).flip(4).flatten(3)
    return (exact_BNHD * cos_N1D + swapped_BNHD * sin_N1D).to(x_BNHD.dtype)
