"""Full-size models without downloads: the published sizes, the same weights and conditions everywhere, sane values."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastgrpo.config import load_config
from fastgrpo.models.architectures import Architecture, FluxArchitecture, SD3Architecture
from fastgrpo.models.flux import Flux
from fastgrpo.models.lora import LoRA
from fastgrpo.models.random_weights import random_module
from fastgrpo.models.sd3 import StableDiffusion3
from fastgrpo.pieces import build, build_partial
from fastgrpo.train import build_trainer
from fastgrpo_kernels import combined
from tests.tiny_config import make_overrides

# parameters of the published transformers
SIZES = {"sd35_medium": 2_243_171_520, "sd35_large": 8_056_627_520, "flux_dev": 11_901_408_320}
SMALL: dict[str, Any] = {"num_heads": 2, "text_width": 32, "pooled_width": 24, "decoder_channels": (8, 8, 16, 16)}
# what a config may hold, whatever the types say
ONE_NUMBER: Any = 8
TWO_NUMBERS: Any = (64, 64)
SMALL_SD3 = SD3Architecture(**SMALL, num_layers=3, num_dual_layers=1)
SMALL_FLUX = FluxArchitecture(**SMALL, num_layers=2, num_single_layers=2)


def make_model(architecture: Architecture, dtype: str = "float32") -> StableDiffusion3 | Flux:
    make: Any = Flux if isinstance(architecture, FluxArchitecture) else StableDiffusion3
    return make(
        weights="random",
        architecture=architecture,
        adaptation=LoRA(rank=2),
        resolution=64,
        max_sequence_length=5,
        dtype=dtype,
        decode_dtype=dtype,
    )


def architecture_of(name: str) -> Architecture:
    return build(load_config("train", [f"model={name}"]).model.architecture)


@pytest.mark.parametrize(("name", "num_parameters"), SIZES.items())
def test_the_sizes_are_the_published_ones(name: str, num_parameters: int) -> None:
    with torch.device("meta"):
        transformer = architecture_of(name).make_transformer()
        autoencoder = architecture_of(name).make_autoencoder()
    assert sum(weight.numel() for weight in transformer.parameters()) == num_parameters
    # as all three publish it
    assert sum(weight.numel() for weight in autoencoder.parameters()) == 83_819_683


@pytest.mark.parametrize("depth", ["two blocks", pytest.param("all blocks", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SIZES)
def test_a_full_size_model_gives_a_velocity_its_gradient_and_an_image(name: str, depth: str) -> None:
    shorter = ["model.architecture.num_layers=2"] * (depth == "two blocks")
    if shorter:
        dual = 1 if name == "sd35_medium" else 0
        kind = "num_single_layers=2" if name == "flux_dev" else f"num_dual_layers={dual}"
        shorter.append(f"model.architecture.{kind}")
    config = load_config("train", [f"model={name}", "model.weights=random", *shorter])
    # shapes and types without a single value
    with FakeTensorMode():
        model = build_partial(config.model, "adaptation")(adaptation=LoRA())
        x, conditions = torch.randn(2, *model.latent_shape), model.encode(["a red circle", "two blue squares"])
        v = combined(model.velocity(x, 0.7, conditions))
        v.float().sum().backward()
        images = model.decode(x)
    assert conditions.embeds_BLC.shape == (2, 128 if name == "flux_dev" else 205, 4096)
    assert v.shape == x.shape == (2, 16, 64, 64)
    assert {weight.dtype for weight in model.transformer.parameters() if not weight.requires_grad} == {torch.bfloat16}
    assert images.shape == (2, 3, 512, 512)
    assert all(weight.grad.shape == weight.shape for weight in model.trainable.values())


@pytest.mark.parametrize("architecture", [SMALL_SD3, SMALL_FLUX], ids=["sd3", "flux"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_neither_vanish_nor_blow_up(architecture: Architecture, dtype: str) -> None:
    deep = replace(architecture, num_layers=12, decoder_channels=(32, 32, 64, 64))
    model = make_model(deep, dtype)
    x = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    with model.sampling():
        v = combined(model.velocity(x, 0.7, model.encode(["a red circle", "two blue squares"]))).float()
    assert 0.5 < v.std() < 2
    images = model.decode(x)
    assert 0.1 < images.std() < 0.4
    # few pixels are black or white
    assert ((images == 0) | (images == 1)).float().mean() < 0.3


@torch.no_grad()
@pytest.mark.parametrize("architecture", [SMALL_SD3, SMALL_FLUX], ids=["sd3", "flux"])
def test_the_velocity_depends_on_text_latent_and_time(architecture: Architecture) -> None:
    model = make_model(architecture)
    x = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))

    def velocity(x: Tensor, t: float, text: str) -> Tensor:
        return combined(model.velocity(x, t, model.encode([text])))

    v = velocity(x, 0.7, "a red circle")
    for other in (
        velocity(x, 0.7, "two"),
        velocity(x.roll(1, 3), 0.7, "a red circle"),
        velocity(x, 0.2, "a red circle"),
    ):
        assert (other - v).std() > 0.05


def test_weights_are_of_the_asked_type_and_a_function_of_the_seed() -> None:
    def weights(architecture: SD3Architecture, dtype: torch.dtype) -> dict[str, Tensor]:
        pipeline = architecture(device=torch.device("cpu"), dtype=dtype, decode_dtype=torch.float32)
        assert {weight.dtype for weight in pipeline.vae.parameters()} == {torch.float32}
        return pipeline.transformer.state_dict()

    first, again = (weights(SMALL_SD3, torch.bfloat16) for _ in range(2))
    other = weights(replace(SMALL_SD3, seed=1), torch.bfloat16)
    assert {weight.dtype for weight in first.values()} == {torch.bfloat16}
    assert all(torch.equal(weight, again[name]) for name, weight in first.items())
    matrices = [name for name, weight in first.items() if weight.ndim > 1]
    assert not any(torch.equal(first[name], other[name]) for name in matrices)


def test_matrices_keep_the_scale_of_their_inputs() -> None:
    layer = random_module(lambda: torch.nn.Linear(400, 300), device="cpu", dtype=torch.float32, seed=0)
    assert layer.weight.std().item() == pytest.approx(400**-0.5, rel=0.01)
    assert not layer.bias.any()


IN_ANOTHER_PROCESS = """
import torch
from fastgrpo.models.random_weights import random_embedding
print(random_embedding("a", 1, 24, seed=0, dtype=torch.float32, device=torch.device("cpu")).tolist())
"""


def test_conditions_are_a_function_of_the_text_in_every_process() -> None:
    def condition(text: str) -> tuple[Tensor, Tensor]:
        return SMALL_SD3.condition(text, 5, torch.device("cpu"), torch.float32)

    script = [sys.executable, "-c", IN_ANOTHER_PROCESS]
    output = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    embeds_BLC, pooled_BC = condition("a")
    assert pooled_BC.tolist() == json.loads(output)
    assert embeds_BLC.std().item() == pytest.approx(1, abs=0.1)
    assert not any(torch.equal(*parts) for parts in zip(condition("a"), condition("b"), strict=True))


@pytest.mark.parametrize("model", ["sd35_miniature", "flux_miniature"])
def test_a_miniature_trains_without_any_file(model: str, tmp_path: Path) -> None:
    settings = ["model.resolution=32", "model.architecture.num_layers=2"]
    overrides = make_overrides(Path("random"), tmp_path / "run", f"model={model}", *settings)
    trainer = build_trainer(load_config("train", overrides))
    for _ in range(2):
        metrics = trainer.step()
        assert metrics["ratio_deviation"] == 0
        assert metrics["grad_norm"] > 0


@pytest.mark.parametrize(
    ("architecture", "load"),
    [(SMALL_SD3, StableDiffusion3Pipeline.lora_state_dict), (SMALL_FLUX, FluxPipeline.lora_state_dict)],
    ids=["sd3", "flux"],
)
def test_adapters_are_saved_and_a_whole_pipeline_is_not(
    architecture: Architecture, load: Callable[..., Any], tmp_path: Path
) -> None:
    model = make_model(architecture)
    model.save_lora(tmp_path)
    saved = load(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    assert set(saved) == {f"transformer.{name}" for name in model.trainable}
    assert all(torch.equal(saved[f"transformer.{name}"], weight) for name, weight in model.trainable.items())
    with pytest.raises(ValueError, match=r"model\.weights=random has no text encoders and cannot be exported"):
        model.save_merged(tmp_path / "merged")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(SMALL_SD3, num_layers=0), r"num_layers must be at least 1, got 0"),
        (lambda: replace(SMALL_SD3, num_heads=-2), r"num_heads must be at least 1, got -2"),
        (lambda: replace(SMALL_SD3, head_width=0), r"head_width must be at least 1, got 0"),
        (lambda: replace(SMALL_SD3, text_width=0), r"text_width must be at least 1, got 0"),
        (lambda: replace(SMALL_SD3, pooled_width=0), r"pooled_width must be at least 1, got 0"),
        (lambda: replace(SMALL_SD3, decoder_layers=0), r"decoder_layers must be at least 1, got 0"),
        (lambda: replace(SMALL_SD3, max_positions=0), r"max_positions must be at least 1, got 0"),
        (lambda: replace(SMALL_SD3, seed=-1), r"seed must be at least 0, got -1"),
        (lambda: replace(SMALL_SD3, num_dual_layers=4), r"num_dual_layers must lie in 0 to num_layers=3, got 4"),
        (lambda: replace(SMALL_SD3, num_dual_layers=-1), r"num_dual_layers must lie in 0 to num_layers=3, got -1"),
        (lambda: replace(SMALL_SD3, head_width=63), r"num_heads \* head_width must be a multiple of 4, .* got 2 \* 63"),
        (lambda: replace(SMALL_SD3, decoder_channels=()), r"decoder_channels must be positive, got \(\)"),
        (lambda: replace(SMALL_SD3, decoder_channels=(8, 0)), r"decoder_channels must be positive, got \(8, 0\)"),
        (
            lambda: replace(SMALL_SD3, decoder_channels=ONE_NUMBER),
            r"decoder_channels is a list of whole numbers, .* got 8",
        ),
        (lambda: replace(SMALL_FLUX, num_single_layers=-1), r"num_single_layers must be at least 0, got -1"),
        (lambda: replace(SMALL_FLUX, head_width=64), r"rotated_widths must add up to head_width: \(16, 56, 56\), 64"),
        (
            lambda: replace(SMALL_FLUX, rotated_widths=TWO_NUMBERS),
            r"rotated_widths must be three even positive numbers",
        ),
        (
            lambda: replace(SMALL_FLUX, rotated_widths=(15, 57, 56)),
            r"rotated_widths must be three even positive number",
        ),
    ],
)
def test_wrong_sizes_are_refused_by_their_name(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^model\.architecture\." + message):
        make()


@pytest.mark.parametrize(
    ("architecture", "largest"),
    [
        (replace(SMALL_SD3, max_positions=6), 6 * 2 * 8),
        (replace(SMALL_SD3, max_positions=9, decoder_channels=(8, 8)), 9 * 2 * 2),
    ],
)
def test_a_table_of_positions_bounds_the_resolution(architecture: SD3Architecture, largest: int) -> None:
    def make(resolution: int) -> None:
        StableDiffusion3(weights="random", architecture=architecture, adaptation=LoRA(), resolution=resolution)

    step = 2 * 2 ** (len(architecture.decoder_channels) - 1)
    with FakeTensorMode():
        make(largest)
        with pytest.raises(ValueError, match=rf"model\.resolution={largest + step}: .* must be at most {largest};"):
            make(largest + step)
        with pytest.raises(
            ValueError,
            match=rf"model\.resolution={step + 1}: .* must be multiples of {step}; {step} and {2 * step} are",
        ):
            make(step + 1)
