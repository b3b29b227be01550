"""Decoding in half precision is channels-last and near float32's, for a trained autoencoder and a random one."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastgrpo.models.lora import LoRA
from fastgrpo.models.sd3 import StableDiffusion3

# root mean square and largest error of a pixel in [0, 1]: a value of bfloat16 has 8 bits, and errors of some ten layers
# add up; float16 has 11
TOLERANCES = {"bfloat16": (1 / 255, 16 / 255), "float16": (0.125 / 255, 2 / 255)}
EMBEDDED = "pkg://fastgrpo.shapes/checkpoint"


def make_model(weights: str, decode_dtype: str) -> StableDiffusion3:
    return StableDiffusion3(
        weights=weights,
        adaptation=LoRA(rank=1),
        resolution=64,
        max_sequence_length=0,
        use_t5=False,
        decode_dtype=decode_dtype,
    )


def make_latents(weights: str) -> Tensor:
    """Latents of images that the embedded model drew; noise for the random autoencoder."""
    model = make_model(weights, "float32")
    x_BCHW = torch.randn(8, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    if weights != EMBEDDED:
        return x_BCHW
    conditions = model.encode(["a red circle", "two blue squares"]).repeat(4)
    grid = [1 - i / 8 for i in range(9)]
    with model.sampling():
        for t, t_next in pairwise(grid):
            v_BCHW = model.velocity(x_BCHW, t, conditions)
            assert isinstance(v_BCHW, Tensor)
            x_BCHW = x_BCHW + (t_next - t) * v_BCHW
    return x_BCHW


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("is_trained", [True, False], ids=["trained", "random"])
def test_images_are_within_the_tolerance_of_the_type(is_trained: bool, dtype: str, tiny_weights: Path) -> None:
    weights = EMBEDDED if is_trained else str(tiny_weights)
    x_BCHW = make_latents(weights)
    exact = make_model(weights, "float32").decode(x_BCHW)
    found = make_model(weights, dtype).decode(x_BCHW)
    assert found.dtype == torch.float32
    assert exact.std() > 0.02
    root_mean_square, largest = TOLERANCES[dtype]
    error = (found - exact).abs()
    assert 0 < error.square().mean().sqrt() < root_mean_square
    assert error.max() < largest


@pytest.mark.parametrize(
    ("dtype", "memory_format"), [("bfloat16", torch.channels_last), ("float32", torch.contiguous_format)]
)
def test_half_precision_runs_channels_last_from_the_latents_to_the_last_convolution(
    dtype: str, memory_format: torch.memory_format, tiny_weights: Path
) -> None:
    model = make_model(str(tiny_weights), dtype)
    decoder = model.pipeline.vae.decoder
    seen = []
    convolutions = [module for module in decoder.modules() if isinstance(module, torch.nn.Conv2d)]
    hooks = [
        module.register_forward_hook(lambda module, args, out: seen.append((module, args[0], out)))
        for module in convolutions
    ]
    images_BCHW = model.decode(make_latents(str(tiny_weights)))
    for hook in hooks:
        hook.remove()
    assert {id(module) for module, *_ in seen} == {id(module) for module in convolutions}
    for module, before, after in seen:
        for tensor in (module.weight, before, after):
            assert tensor.is_contiguous(memory_format=memory_format), module
    # what rewards get is as it always was
    assert images_BCHW.is_contiguous()
