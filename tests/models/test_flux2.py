"""Our FLUX.2 klein is diffusers': images, velocities, gradients and LoRA files; what it reads and refuses to read."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from safetensors.torch import load_file
from torch import Tensor

from fastgrpo.algorithm.schedule import Flux2Schedule
from fastgrpo.commands.doctor import replayed
from fastgrpo.compile.blocks import num_compilations
from fastgrpo.config import load_config
from fastgrpo.distributed.world import World
from fastgrpo.memory.batches import BatchSizes
from fastgrpo.models.adaptation import FullFineTuning
from fastgrpo.models.attention import attention_backend
from fastgrpo.models.blocks.modulation import Modulations
from fastgrpo.models.flux2 import Flux2Klein, Flux2Network
from fastgrpo.models.fp8 import Fp8
from fastgrpo.models.lora import LoRA
from fastgrpo.models.random_weights import random_module
from fastgrpo.sampler import Sampler
from fastgrpo.train import build_trainer
from fastgrpo.types import Conditions, Prompts, Samples, Time
from fastgrpo_kernels import combined
from tests.ranks import Ranks, ranks_of_module
from tests.tiny import PROMPTS
from tests.tiny_config import make_overrides
from tests.tiny_flux2 import NUM_TEMPLATE_TOKENS, TEXT_WIDTH, make_pipeline, make_transformer

# of 12, 16 and 16 bytes
TEXTS = list(PROMPTS[:3])
TARGETS = tuple(load_config("train", ["adaptation=lora_flux2"]).adaptation.targets)
T = 0.5
GUIDANCE = 4.0
LENGTH = NUM_TEMPLATE_TOKENS + 18

on_ranks = ranks_of_module()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("weights") / "flux2")


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("weights") / "flux2_distilled", is_distilled=True)


def make_model(weights: Path, **settings: Any) -> Flux2Klein:
    defaults: dict[str, Any] = {
        "weights": str(weights),
        "adaptation": LoRA(rank=2, alpha=4.0, targets=TARGETS),
        "resolution": 64,
        "guidance_scale": GUIDANCE,
        "max_sequence_length": LENGTH,
    }
    return Flux2Klein(**defaults | settings)


def make_start(num_samples: int = 3) -> Tensor:
    return torch.randn(num_samples, 16, 4, 4, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def nudge(trainable: dict[str, torch.nn.Parameter]) -> None:
    """Adapters that matter: they start at zero."""
    generator = torch.Generator().manual_seed(2)
    for weight in trainable.values():
        weight.add_(0.05 * torch.randn(weight.shape, generator=generator))


def images_of_ours(model: Flux2Klein) -> Tensor:
    sampler = Sampler(model=model, grid=Flux2Schedule(4, 64)(), batch_sizes=BatchSizes.of(2))
    return sampler(Samples.all_of(Prompts(TEXTS, ids=[0, 1, 2]), 1), model.encode(TEXTS), make_start())


def images_of_diffusers(pipeline: Flux2KleinPipeline, guidance_scale: float = GUIDANCE) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 4, "height": 64, "width": 64, "max_sequence_length": LENGTH}
    return pipeline(
        prompt=TEXTS, latents=make_start(), guidance_scale=guidance_scale, output_type="pt", **settings
    ).images


@pytest.mark.parametrize("guidance_scale", [GUIDANCE, 1.0])
def test_the_ode_gives_the_images_of_diffusers(guidance_scale: float, weights: Path) -> None:
    ours = images_of_ours(make_model(weights, guidance_scale=guidance_scale))
    theirs = images_of_diffusers(Flux2KleinPipeline.from_pretrained(weights), guidance_scale)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    # the images are no constant, and depend on guidance
    assert ours.std() > 0.01
    assert (ours - images_of_ours(make_model(weights, guidance_scale=2.0))).abs().max() > 1e-3


def test_a_distilled_model_gives_the_images_of_diffusers_and_takes_no_guidance(distilled: Path) -> None:
    ours = images_of_ours(make_model(distilled, guidance_scale=1.0))
    # diffusers warns that it leaves guidance out
    theirs = images_of_diffusers(Flux2KleinPipeline.from_pretrained(distilled))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match=r"guidance_scale is 4\.0, but this model was distilled .* use model\.guidanc"):
        make_model(distilled)


def make_network(**settings: Any) -> Flux2Network:
    defaults: dict[str, Any] = {"compile": lambda function: function, "checkpointing": False}
    return Flux2Network(
        attention=attention_backend("sdpa"), modulations=Modulations(is_frozen=True), **defaults | settings
    )


def make_inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Conditions]:
    """Of images that are higher than wide."""
    generator = torch.Generator().manual_seed(1)
    x_BCHW, embeds_BLC = (torch.randn(shape, generator=generator) for shape in ((2, 16, 6, 4), (2, 5, 3 * TEXT_WIDTH)))
    return x_BCHW, Conditions(embeds_BLC.to(dtype), torch.empty(2, 0, dtype=dtype), (0, 1))


def diffusers_velocity(transformer: Flux2Transformer2DModel, x_BCHW: Tensor, t: Time, conditions: Conditions) -> Tensor:
    v_BLC = transformer(
        hidden_states=Flux2KleinPipeline._pack_latents(x_BCHW.to(transformer.dtype)),
        encoder_hidden_states=conditions.embeds_BLC,
        timestep=t if isinstance(t, Tensor) else torch.full((len(x_BCHW),), t),
        img_ids=Flux2KleinPipeline._prepare_latent_ids(x_BCHW),
        txt_ids=Flux2KleinPipeline._prepare_text_ids(conditions.embeds_BLC),
        return_dict=False,
    )[0]
    return v_BLC.transpose(1, 2).unflatten(2, x_BCHW.shape[2:])


def make_random_transformer(dtype: torch.dtype = torch.float32) -> Any:
    return random_module(make_transformer, device="cpu", dtype=dtype, seed=0)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)], ids=str)
@pytest.mark.parametrize("t", [T, torch.tensor([0.3, 0.9])], ids=["one time", "times"])
def test_the_velocity_is_that_of_diffusers(t: Time, dtype: torch.dtype, tolerance: float) -> None:
    transformer, (x, conditions) = make_random_transformer(dtype), make_inputs(dtype)
    ours, theirs = make_network()(transformer, x, t, conditions), diffusers_velocity(transformer, x, t, conditions)
    assert ours.dtype == theirs.dtype == dtype
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
