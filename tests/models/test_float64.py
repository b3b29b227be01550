"""model.dtype=float64 is float64 throughout: two ways to the same velocity differ by its rounding, not by float32's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from fastgrpo.models.flux import Flux
from fastgrpo.models.lora import LoRA
from fastgrpo.models.pipeline_model import PipelineModel
from fastgrpo.models.sd3 import StableDiffusion3
from fastgrpo.models.z_image import ZImage
from tests import tiny_flux, tiny_z_image
from tests.tiny import PROMPTS

TEXTS = list(PROMPTS[:2])
T = 0.7


def make_sd3(weights: Path) -> StableDiffusion3:
    return StableDiffusion3(
        weights=str(weights),
        adaptation=LoRA(rank=4),
        resolution=64,
        max_sequence_length=0,
        use_t5=False,
        dtype="float64",
        decode_dtype="float64",
    )


@pytest.fixture(params=["sd3", "flux", "z_image"])
def model(request: pytest.FixtureRequest, tiny_weights: Path, tmp_path: Path) -> PipelineModel:
    """With adapters that do something."""
    if request.param == "sd3":
        made: PipelineModel = make_sd3(tiny_weights)
    elif request.param == "z_image":
        weights = tiny_z_image.make_pipeline(tmp_path / "z_image")
        settings: dict[str, Any] = {"resolution": 64, "max_sequence_length": 32, "dtype": "float64"}
        made = ZImage(weights=str(weights), adaptation=LoRA(rank=4), **settings)
    else:
        made = Flux(
            weights=str(tiny_flux.make_pipeline(tmp_path / "flux")),
            adaptation=LoRA(rank=4),
            resolution=64,
            guidance_scale=3.5,
            max_sequence_length=7,
            dtype="float64",
        )
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in made.trainable.values():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.1)
    return made


def velocity_of(model: PipelineModel, x_BCHW: Tensor) -> Tensor:
    v_BCHW = model.velocity(x_BCHW, T, model.encode(TEXTS))
    assert isinstance(v_BCHW, Tensor)
    return v_BCHW.detach()


def make_latents() -> Tensor:
    return torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_the_velocity_and_the_images_are_those_of_diffusers_in_float64(tiny_weights: Path) -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        tiny_weights, text_encoder_3=None, tokenizer_3=None, dtype=torch.float64
    )
    model, x = make_sd3(tiny_weights), make_latents()
    embeds, _, pooled, _ = pipeline.encode_prompt(TEXTS, None, None, False, do_classifier_free_guidance=False,
                                                  max_sequence_length=0)  # fmt: skip
    conditions = model.encode(TEXTS)
    torch.testing.assert_close(conditions.embeds_BLC, embeds, atol=1e-12, rtol=0)
    with torch.no_grad():
        theirs = pipeline.transformer(x, embeds, pooled, torch.full((2,), 1000 * T)).sample
        decoded = pipeline.vae.decode(x / 1.5 + 0.06).sample / 2 + 0.5
    # diffusers' RMS norm takes the mean square in float32; all of the velocity in float32 is wrong by 4e-7
    torch.testing.assert_close(velocity_of(model, x), theirs, atol=1e-8, rtol=0)
    # images are float32 whatever the type of the autoencoder: half a unit of its last place
    torch.testing.assert_close(model.decode(x).double(), decoded.clamp(0, 1), atol=6e-8, rtol=0)


def test_merged_adapters_are_the_adapters_to_float64(model: PipelineModel) -> None:
    x = make_latents()
    unmerged = velocity_of(model, x)
    with model.sampling():
        merged = velocity_of(model, x)
    torch.testing.assert_close(merged, unmerged, atol=1e-12, rtol=0)
    assert not torch.equal(merged, unmerged)


def test_the_gradient_is_the_difference_quotient_to_float64(model: PipelineModel) -> None:
    x = make_latents()
    generator = torch.Generator().manual_seed(3)
    ways = [torch.randn(w.shape, generator=generator, dtype=torch.float64) for w in model.trainable.values()]

    def value(step: float) -> Tensor:
        with torch.no_grad():
            for weight, way in zip(model.trainable.values(), ways, strict=True):
                weight.add_(way, alpha=step)
        v = model.velocity(x, T, model.encode(TEXTS))
        assert isinstance(v, Tensor)
        return v.square().mean()

    value(0.0).backward()
    slope = 0.0
    for weight, way in zip(model.trainable.values(), ways, strict=True):
        assert weight.grad is not None
        slope += (weight.grad * way).sum().item()
    step = 3e-7
    above, below = value(step).item(), value(-2 * step).item()
    # in float32 the quotient has an error of about 5e-2
    assert (above - below) / (2 * step) == pytest.approx(slope, rel=1e-7)
