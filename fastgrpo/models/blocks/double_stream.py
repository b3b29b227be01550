"""A double-stream block: image and text tokens have weights of their own and attend together.

    x <- x + g1 * attention(norm(x) * (1 + b1) + a1)
    x <- x + g2 * feed_forward(norm(x) * (1 + b2) + a2)

FLUX, FLUX.2 and Qwen-Image have it, each with its feed-forward.  Image tokens come first: text that fills a sample up
is then at its end.
Letters: B samples, L image tokens, M text tokens, N = L + M, C width of a token, E width of a modulation.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgrpo.models.attention import Attention
from fastgrpo.models.blocks.heads import joint_heads
from fastgrpo.models.blocks.modulation import modulated, normed, parts
from fastgrpo.models.blocks.network import clipped
from fastgrpo.models.blocks.rotary import Rotation, rotated


def double_stream(
    attn: Any,
    feed_forward: Callable[[Any, Tensor], Tensor],
    image_ff: Any,
    text_ff: Any,
    x_BLC: Tensor,
    context_BMC: Tensor,
    image_BE: Tensor,
    text_BE: Tensor,
    rotation: Rotation,
    lengths_B: Tensor | None,
    attention: Attention,
) -> tuple[Tensor, Tensor]:
    """Image and text tokens after a block; ``lengths_B`` of its N tokens are seen of each sample, None is all."""
    shift, scale, gate, *rest = parts(image_BE, 6)
    text_shift, text_scale, text_gate, *text_rest = parts(text_BE, 6)
    y_BLC = modulated(normed(x_BLC), shift, scale)
    text_BMC = modulated(normed(context_BMC), text_shift, text_scale)
    q, k, v = (torch.cat([image, text], dim=1) for image, text in joint_heads(attn, y_BLC, text_BMC))
    seen_BNC = attention(rotated(q, rotation), rotated(k, rotation), v, lengths_B).flatten(2)
    num_image = x_BLC.shape[1]
    x_BLC = x_BLC + gate * attn.to_out[0](seen_BNC[:, :num_image])
    context_BMC = context_BMC + text_gate * attn.to_add_out(seen_BNC[:, num_image:])
    return (
        clipped(_fed_forward(feed_forward, image_ff, x_BLC, *rest)),
        clipped(_fed_forward(feed_forward, text_ff, context_BMC, *text_rest)),
    )


def _fed_forward(
    feed_forward: Callable[[Any, Tensor], Tensor], ff: Any, x_BLC: Tensor, shift: Tensor, scale: Tensor, gate: Tensor
) -> Tensor:
    return x_BLC + gate * feed_forward(ff, modulated(normed(x_BLC), shift, scale))
