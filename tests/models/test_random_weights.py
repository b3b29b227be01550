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
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    FluxPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastgrpo.assembly import build_trainer
from fastgrpo.config import load_config
from fastgrpo.models.architectures import Architecture
from fastgrpo.models.flux import Flux
from fastgrpo.models.lora import LoRA
from fastgrpo.models.random_weights import random_module
from fastgrpo.models.sd3 import StableDiffusion3
from fastgrpo.pieces import build, build_partial
from fastgrpo_kernels import combined
from tests.tiny_config import make_overrides

# parameters of the published transformers
SIZES = {"sd35_medium": 2_243_171_520, "sd35_large": 8_056_627_520, "flux_dev": 11_901_408_320}
FAMILIES: dict[str, Any] = {"sd35_medium": StableDiffusion3, "sd35_large": StableDiffusion3, "flux_dev": Flux}
AUTOENCODER: dict[str, Any] = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [8, 8, 16, 16],
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 8,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
SMALL_SD3 = Architecture(
    transformer={
        "sample_size": 128,
        "num_layers": 3,
        "num_attention_heads": 2,
        "attention_head_dim": 64,
        "caption_projection_dim": 128,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 24,
        "pos_embed_max_size": 384,
        "dual_attention_layers": [0],
        "qk_norm": "rms_norm",
    },
    autoencoder=AUTOENCODER,
)
SMALL_FLUX = Architecture(
    transformer={
        "num_layers": 2,
        "num_single_layers": 2,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 24,
        "guidance_embeds": True,
    },
    autoencoder=AUTOENCODER,
)


def other_sizes(architecture: Architecture, **transformer: Any) -> Architecture:
    return replace(architecture, transformer={**architecture.transformer, **transformer})


def make_model(architecture: Architecture, dtype: str = "float32", resolution: int = 64) -> StableDiffusion3 | Flux:
    make: Any = Flux if "num_single_layers" in architecture.transformer else StableDiffusion3
    return make(
        weights="random",
        architecture=architecture,
        adaptation=LoRA(rank=2),
        resolution=resolution,
        max_sequence_length=5,
        dtype=dtype,
        decode_dtype=dtype,
    )


def architecture_of(name: str) -> Architecture:
    return build(load_config("train", [f"model={name}"]).model.architecture)


@pytest.mark.parametrize(("name", "num_parameters"), SIZES.items())
def test_the_sizes_are_the_published_ones(name: str, num_parameters: int) -> None:
    with torch.device("meta"):
        sizes, family = architecture_of(name), FAMILIES[name]
        transformer = family.transformer_class(**sizes.sizes("transformer", family.transformer_class))
        autoencoder = AutoencoderKL(**sizes.sizes("autoencoder", AutoencoderKL))
    assert sum(weight.numel() for weight in transformer.parameters()) == num_parameters
    # as all three publish it
    assert sum(weight.numel() for weight in autoencoder.parameters()) == 83_819_683


@pytest.mark.parametrize("depth", ["two blocks", pytest.param("all blocks", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SIZES)
def test_a_full_size_model_gives_a_velocity_its_gradient_and_an_image(name: str, depth: str) -> None:
    kind = {"sd35_medium": "dual_attention_layers=[0]", "sd35_large": "seed=0", "flux_dev": "num_single_layers=2"}[name]
    shorter = ["num_layers=2", *([kind] if kind != "seed=0" else [])] if depth == "two blocks" else []
    shorter = [f"model.architecture.transformer.{size}" for size in shorter]
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
    autoencoder = {**architecture.autoencoder, "block_out_channels": [32, 32, 64, 64], "norm_num_groups": 32}
    deep = replace(other_sizes(architecture, num_layers=12), autoencoder=autoencoder)
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
    def weights(architecture: Architecture, dtype: torch.dtype) -> dict[str, Tensor]:
        return architecture.make(
            "transformer", SD3Transformer2DModel, device=torch.device("cpu"), dtype=dtype
        ).state_dict()

    first, again = (weights(SMALL_SD3, torch.bfloat16) for _ in range(2))
    other = weights(replace(SMALL_SD3, seed=1), torch.bfloat16)
    assert {weight.dtype for weight in first.values()} == {torch.bfloat16}
    assert all(torch.equal(weight, again[name]) for name, weight in first.items())
    matrices = [name for name, weight in first.items() if weight.ndim > 1 and name != "pos_embed.pos_embed"]
    assert not any(torch.equal(first[name], other[name]) for name in matrices)
    # a table of positions is what it is in diffusers
    made = SD3Transformer2DModel(**SMALL_SD3.transformer).pos_embed.pos_embed
    assert torch.equal(first["pos_embed.pos_embed"], made.bfloat16())


def test_scales_that_are_multiplied_with_images_are_one() -> None:
    vae = random_module(
        lambda: AutoencoderKLQwenImage(base_dim=4, num_res_blocks=1), device="cpu", dtype=torch.float32, seed=0
    )
    scales = [weight for name, weight in vae.named_parameters() if name.endswith("gamma")]
    assert {weight.ndim for weight in scales} == {3, 4}
    assert all((weight == 1).all() for weight in scales)


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
        return SMALL_SD3.condition(text, 82, (32, 24), torch.device("cpu"), torch.float32)

    script = [sys.executable, "-c", IN_ANOTHER_PROCESS]
    output = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    embeds_BLC, pooled_BC = condition("a")
    assert pooled_BC.tolist() == json.loads(output)
    assert embeds_BLC.std().item() == pytest.approx(1, abs=0.1)
    assert not any(torch.equal(*parts) for parts in zip(condition("a"), condition("b"), strict=True))


@pytest.mark.parametrize("model", ["sd35_miniature", "flux_miniature"])
def test_a_miniature_trains_without_any_file(model: str, tmp_path: Path) -> None:
    settings = ["model.resolution=32", "model.architecture.transformer.num_layers=2"]
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
    ("sizes", "message"),
    [
        ({"layers": 2}, r"^unknown key model\.architecture\.transformer\.layers; SD3Transformer2DModel takes sample_s"),
        ({"num_attention_heads": 0}, r"^model\.architecture\.transformer: SD3Transformer2DModel cannot be made .* \(Z"),
        ({"num_layers": "two"}, r"^model\.architecture\.transformer: SD3Transformer2DModel cannot be made .* \(Type"),
    ],
)
def test_wrong_sizes_are_refused_by_their_name(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(other_sizes(SMALL_SD3, **sizes))


def test_parts_of_an_architecture_have_keys_of_their_own() -> None:
    number: Any = 3
    with pytest.raises(ValueError, match=r"^model\.architecture\.transformer has keys of its own, got 3"):
        replace(SMALL_SD3, transformer=number)
    with pytest.raises(ValueError, match=r"^model\.architecture\.seed must be at least 0, got -1"):
        replace(SMALL_SD3, seed=-1)


@pytest.mark.parametrize(
    ("positions", "levels", "largest"), [(6, 4, 6 * 2 * 8), (9, 2, 9 * 2 * 2)], ids=["eight pixels", "two pixels"]
)
def test_a_table_of_positions_bounds_the_resolution(positions: int, levels: int, largest: int) -> None:
    autoencoder = {**AUTOENCODER, "block_out_channels": [8] * levels}
    for key in ("down_block_types", "up_block_types"):
        autoencoder[key] = AUTOENCODER[key][:levels]
    architecture = replace(other_sizes(SMALL_SD3, pos_embed_max_size=positions), autoencoder=autoencoder)
    step = 2 * 2 ** (levels - 1)
    with FakeTensorMode():
        make_model(architecture, resolution=largest)
        with pytest.raises(ValueError, match=rf"model\.resolution={largest + step}: .* must be at most {largest};"):
            make_model(architecture, resolution=largest + step)
        with pytest.raises(
            ValueError,
            match=rf"model\.resolution={step + 1}: .* must be multiples of {step}; {step} and {2 * step} are",
        ):
            make_model(architecture, resolution=step + 1)
