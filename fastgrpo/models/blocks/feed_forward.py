"""What a block computes of each token alone, over diffusers' layers.

    gelu_feed_forward(y)           = W2 gelu(W1 y)                    gelu in its tanh form
    swiglu(gate, value)            = silu(gate) * value
    fused_swiglu_feed_forward(y)   = W2 swiglu(W1 y)                  W1 makes gates, then values

Letters: B samples, L tokens, I and C widths of a token, O outputs, M = B * L rows.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgrpo.models.gelu_product import frozen_feed_forward, has_epilogues


def gelu_feed_forward(ff: Any, y_BLC: Tensor) -> Tensor:
    """Of diffusers' ``FeedForward``."""
    first, second = ff.net[0].proj, ff.net[2]
    is_frozen = _is_frozen(first) and _is_frozen(second)
    if torch.is_grad_enabled() and is_frozen and has_epilogues(first, second, y_BLC):
        return frozen_feed_forward(first, second, y_BLC)
    output: Tensor = second(gelu_projected(first, y_BLC))
    return output


def gelu_projected(layer: Any, x_BLI: Tensor) -> Tensor:
    """gelu(W x + b) in its tanh form; on a GPU without gradient, the product applies it to what it has summed up."""
    plain = layer if type(layer) is nn.Linear else getattr(layer, "plain", None)
    # PyTorch's operator computes another form on a CPU
    if plain is None or plain.bias is None or torch.is_grad_enabled() or not x_BLI.is_cuda:
        return F.gelu(layer(x_BLI), approximate="tanh")
    rows_MO = torch.ops.aten._addmm_activation(plain.bias, x_BLI.flatten(0, -2), plain.weight.t(), use_gelu=True)
    return rows_MO.unflatten(0, x_BLI.shape[:-1])


def swiglu(gate_BLI: Tensor, value_BLI: Tensor) -> Tensor:
    return F.silu(gate_BLI) * value_BLI


def fused_swiglu_feed_forward(ff: Any, y_BLC: Tensor) -> Tensor:
    """Of diffusers' ``Flux2FeedForward``."""
    output: Tensor = ff.linear_out(swiglu(*ff.linear_in(y_BLC).chunk(2, dim=-1)))
    return output


def _is_frozen(layer: Any) -> bool:
    return type(layer) is nn.Linear and not layer.weight.requires_grad
