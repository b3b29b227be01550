"""Random weights and random conditions in place of a published model's: for throughput, memory and tests.

    matrices, convolutions   N(0, 1 / inputs)   so that activations keep their scale from layer to layer
    scales of norms          1
    biases                   0
    buffers                  as they are made   tables of positions

Weights are made without storage, then drawn on their device in their type: none is computed in float32 or on the CPU.
Letters: L text tokens, C width of an embedding.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from fastgrpo.on_device import on_device


def random_module(make: Callable[[], Any], *, device: torch.device | str, dtype: torch.dtype, seed: int) -> Any:
    """What ``make`` makes, with random weights: equal in every process for one kind of device, type and seed."""
    with init_empty_weights(include_buffers=False):
        module: nn.Module = make()
    # sharing of weights would be lost; no transformer or autoencoder here has any
    for part in module.modules():
        # one by one: Module.to_empty cannot replace FakeTensors, over which memory is counted
        for name, weight in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(torch.empty_like(weight, device=device, dtype=dtype)))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to(device, dtype if buffer.is_floating_point() else None))
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            _fill(name, weight, generator)
    return module


def random_embedding(text: str, *shape: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """N(0, 1) of a shape, a pure function of text and seed: equal in every process and on every device."""
    digest = hashlib.sha256(f"{seed} {shape} {text}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return on_device(torch.randn(shape, generator=generator).to(dtype), device)


def _fill(name: str, weight: Tensor, generator: torch.Generator) -> None:
    # a scale may have dimensions of one number, to be multiplied with images
    if weight.ndim > 1 and weight.numel() != len(weight):
        weight.normal_(std=(weight.numel() / len(weight)) ** -0.5, generator=generator)
    elif name.endswith(("weight", "gamma")):
        weight.fill_(1)
    else:
        weight.zero_()
