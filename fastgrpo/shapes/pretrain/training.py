"""What the stages share: the optimizer's loop, and scenes to learn from."""

import math
import time
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from fastgrpo.shapes.world import Caption, Shape, sample_scene


def train(
    name: str,
    parameters: Iterable[nn.Parameter],
    loss: Callable[[int], Tensor],
    *,
    steps: int,
    lr: float,
    after: Callable[[int], None] = lambda step: None,
) -> None:
    """AdamW with warm-up and cosine decay, gradients clipped to 1."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    started, running = time.monotonic(), 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        value = loss(step)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        after(step)
        running = value.item() if step == 0 else 0.98 * running + 0.02 * value.item()
        if (step + 1) % 100 == 0:
            print(f"{name} {step + 1}/{steps} loss {running:.4f} {time.monotonic() - started:.0f}s", flush=True)


def random_scenes(captions: list[Caption], generator: np.random.Generator, count: int) -> list[list[Shape]]:
    """``count`` scenes of captions drawn at random."""
    return [sample_scene(captions[i], generator) for i in generator.integers(len(captions), size=count)]
