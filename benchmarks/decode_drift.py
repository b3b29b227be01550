"""How far decoding in bfloat16, channels last, is from float32: a part of ``benchmarks.lossy``."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastgrpo.config import load_config
from fastgrpo.parts import build_model


def pixel_drift(images_BCHW: Tensor, exact_BCHW: Tensor) -> dict[str, float]:
    """Root of the mean square difference of pixels in [0, 1], and the same as a peak signal-to-noise ratio in dB."""
    mean_square = (images_BCHW.double() - exact_BCHW.double()).square().mean().item()
    return {"rms": math.sqrt(mean_square), "psnr": -10 * math.log10(mean_square) if mean_square else math.inf}


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """What it returns, and its seconds: on a CPU those of the processor, which other processes do not lengthen."""
    is_cuda = torch.cuda.is_available()
    now = time.perf_counter if is_cuda else time.process_time
    if is_cuda:
        torch.cuda.synchronize()
    start = now()
    result = run()
    if is_cuda:
        torch.cuda.synchronize()
    return result, now() - start


def decode_drift(overrides: tuple[str, ...], rounds: int, batch: int) -> dict[str, float]:
    """bfloat16 channels_last against float32, on latents of the model's own images, or noise where it is random."""
    models = [
        build_model(load_config("train", [*overrides, f"++model.decode_dtype={dtype}"]))
        for dtype in ("float32", "bfloat16")
    ]
    x_BCHW = _latents(models[0], batch)
    exact, half = (model.decode(x_BCHW) for model in models)
    rows = [[timed(partial(model.decode, x_BCHW))[1] for model in models] for _ in range(rounds)]
    baseline, other = zip(*rows, strict=True)
    return pixel_drift(half, exact) | {
        "largest": (half - exact).abs().max().item(),
        "contrast": exact.std().item(),
        "speed": median_ratio(baseline, other),
    }


@torch.no_grad()
def _latents(model: Any, batch: int) -> Tensor:
    x_BCHW = torch.randn(batch, *model.latent_shape, generator=torch.Generator().manual_seed(0)).to(model.device)
    if model.conditions.encoders == "random":
        return x_BCHW
    conditions = model.encode(["a red circle"]).repeat(batch)
    grid = [1 - i / 10 for i in range(11)]
    with model.sampling():
        for t, t_next in pairwise(grid):
            x_BCHW = x_BCHW + (t_next - t) * model.velocity(x_BCHW, t, conditions)
    return x_BCHW


def median_ratio(baseline: Sequence[float], other: Sequence[float]) -> float:
    """Of the runs of one round each."""
    return statistics.median(a / b for a, b in zip(baseline, other, strict=True))
