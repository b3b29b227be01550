"""Our FLUX is diffusers': images, velocities, gradients and LoRA files; and what guidance and adapters do to it."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor

from fastgrpo.algorithm.algorithm import Algorithm
from fastgrpo.algorithm.schedule import FluxSchedule, LinearSchedule
from fastgrpo.assembly import build_trainer
from fastgrpo.commands.doctor import replayed
from fastgrpo.compile.blocks import num_compilations
from fastgrpo.config import load_config
from fastgrpo.memory.batches import BatchSizes
from fastgrpo.models.attention import attention_backend
from fastgrpo.models.blocks.modulation import Modulations
from fastgrpo.models.flux import Flux, FluxNetwork
from fastgrpo.models.lora import LoRA
from fastgrpo.models.random_weights import random_module
from fastgrpo.pieces import build
from fastgrpo.sampler import Sampler
from fastgrpo.types import Conditions, Prompts, Samples
from fastgrpo_kernels import combined
from tests.tiny_config import make_overrides
from tests.tiny_flux import PROMPTS, TEXT_WIDTH, make_pipeline, make_transformer

TEXTS = list(PROMPTS[:3])
TARGETS = tuple(load_config("train", ["adaptation=lora_flux"]).adaptation.targets)
T = 0.5
GUIDANCE = 3.5


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("weights") / "flux")


def make_model(weights: Path, **settings: Any) -> Flux:
    defaults: dict[str, Any] = {
        "weights": str(weights),
        "adaptation": LoRA(rank=2, alpha=4.0, targets=TARGETS),
        "resolution": 64,
        "guidance_scale": GUIDANCE,
        "max_sequence_length": 7,
    }
    return Flux(**defaults | settings)


def make_start(num_samples: int = 3, height: int = 8, width: int = 8) -> Tensor:
    return torch.randn(num_samples, 16, height, width, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def nudge(trainable: dict[str, torch.nn.Parameter]) -> None:
    """Adapters that matter: they start at zero."""
    generator = torch.Generator().manual_seed(2)
    for weight in trainable.values():
        weight.add_(0.05 * torch.randn(weight.shape, generator=generator))


def images_of_ours(model: Flux, height: int = 64, width: int = 64) -> Tensor:
    sampler = Sampler(model=model, grid=FluxSchedule(4, [height, width])(), batch_sizes=BatchSizes.of(2))
    start = make_start(3, height // 8, width // 8)
    return sampler(Samples.all_of(Prompts(TEXTS, ids=[0, 1, 2]), 1), model.encode(TEXTS), start)


def images_of_diffusers(
    pipeline: FluxPipeline, guidance_scale: float = GUIDANCE, height: int = 64, width: int = 64
) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    packed = FluxPipeline._pack_latents(make_start(3, height // 8, width // 8), 3, 16, height // 8, width // 8)
    settings: dict[str, Any] = {"num_inference_steps": 4, "max_sequence_length": 7, "output_type": "pt"}
    settings |= {"height": height, "width": width}
    return pipeline(TEXTS, latents=packed, guidance_scale=guidance_scale, **settings).images


def test_the_ode_gives_the_images_of_diffusers(weights: Path) -> None:
    ours, theirs = images_of_ours(make_model(weights)), images_of_diffusers(FluxPipeline.from_pretrained(weights))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    # the images are no constant, and depend on the text and on guidance
    assert ours.std() > 0.01
    assert (ours - images_of_ours(make_model(weights, guidance_scale=1.0))).abs().max() > 1e-3


@pytest.mark.parametrize(("height", "width"), [(32, 96), (112, 48)])
def test_images_that_are_not_square_are_those_of_diffusers(height: int, width: int, weights: Path) -> None:
    model = make_model(weights, resolution=[height, width])
    assert model.latent_shape == (16, height // 8, width // 8)
    ours = images_of_ours(model, height, width)
    assert ours.shape == (3, 3, height, width)
    theirs = images_of_diffusers(FluxPipeline.from_pretrained(weights), height=height, width=width)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    # a model that has drawn others keeps the rotations of each resolution
    square = make_model(weights)
    images_of_ours(square)
    images_of_ours(square, width, height)
    assert torch.equal(images_of_ours(square, height, width), ours)


def test_a_model_without_guidance_gives_the_images_of_diffusers(tmp_path: Path) -> None:
    weights = make_pipeline(tmp_path, guidance_embeds=False)
    ours = images_of_ours(make_model(weights, guidance_scale=1.0))
    torch.testing.assert_close(ours, images_of_diffusers(FluxPipeline.from_pretrained(weights)), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match=r"guidance_scale is 3\.5, but .* distilled without guidance"):
        make_model(weights)


def make_network(**settings: Any) -> FluxNetwork:
    defaults: dict[str, Any] = {"compile": lambda function: function, "checkpointing": False}
    return FluxNetwork(
        guidance_scale=GUIDANCE,
        attention=attention_backend("sdpa"),
        modulations=Modulations(is_frozen=True),
        **defaults | settings,
    )


def make_inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Conditions]:
    generator = torch.Generator().manual_seed(1)
    x_BCHW, embeds_BLC, pooled_BC = (
        torch.randn(shape, generator=generator) for shape in ((2, 16, 12, 8), (2, 5, TEXT_WIDTH), (2, TEXT_WIDTH))
    )
    return x_BCHW, Conditions(embeds_BLC.to(dtype), pooled_BC.to(dtype), (0, 1))


def diffusers_velocity(transformer: FluxTransformer2DModel, x_BCHW: Tensor, conditions: Conditions) -> Tensor:
    height, width = x_BCHW.shape[-2:]
    x = FluxPipeline._pack_latents(x_BCHW.to(transformer.dtype), len(x_BCHW), 16, height, width)
    v = transformer(
        hidden_states=x,
        encoder_hidden_states=conditions.embeds_BLC,
        pooled_projections=conditions.pooled_BC,
        timestep=torch.full((len(x),), T),
        guidance=torch.full((len(x),), GUIDANCE) if transformer.config.guidance_embeds else None,
        img_ids=FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, "cpu", torch.float32),
        txt_ids=torch.zeros(conditions.embeds_BLC.shape[1], 3),
        return_dict=False,
    )[0]
    return FluxPipeline._unpack_latents(v, 8 * height, 8 * width, 8)


def make_random_transformer(dtype: torch.dtype = torch.float32, *, guidance_embeds: bool = True) -> Any:
    def make() -> FluxTransformer2DModel:
        return make_transformer(guidance_embeds=guidance_embeds)

    return random_module(make, device="cpu", dtype=dtype, seed=0)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)], ids=str)
@pytest.mark.parametrize("guidance_embeds", [True, False])
def test_the_velocity_is_that_of_diffusers(guidance_embeds: bool, dtype: torch.dtype, tolerance: float) -> None:
    transformer, (x, conditions) = make_random_transformer(dtype, guidance_embeds=guidance_embeds), make_inputs(dtype)
    ours, theirs = make_network()(transformer, x, T, conditions), diffusers_velocity(transformer, x, conditions)
    assert ours.dtype == theirs.dtype == dtype
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_is_that_of_diffusers(checkpointing: bool) -> None:
    # in double precision, which rounding does not blur
    transformer, (x, conditions) = make_random_transformer(torch.float64), make_inputs(torch.float64)
    adaptation = LoRA(rank=2, targets=TARGETS)(transformer)
    nudge(adaptation.trainable)
    cotangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    weights = list(adaptation.trainable.values())
    network = make_network(checkpointing=checkpointing)
    adaptation.stack(network.stacks(transformer))
    stacks: list[Any] = [getattr(block.attn.to_v, "stack", None) for block in transformer.single_transformer_blocks]
    # of queries, keys and values, each block's own
    assert [len(stack.widths) for stack in stacks] == [3, 3]
    assert stacks[0] is not stacks[1]
    ours = torch.autograd.grad(network(transformer, x, T, conditions), weights, cotangent)
    # diffusers' blocks take the same layers, adapters and all
    theirs = torch.autograd.grad(diffusers_velocity(transformer, x, conditions), weights, cotangent)
    for name, our, their in zip(adaptation.trainable, ours, theirs, strict=True):
        assert their.any(), name
        assert (our - their).abs().max() <= 1e-5 * their.abs().max(), name


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_each_kind_of_block_is_compiled_once_and_computes_the_same(backend: str) -> None:
    def compile(function: Callable[..., Any]) -> Callable[..., Any]:
        # traced and guarded as ever, by aot_eager differentiated too, and run by PyTorch's own kernels
        return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)

    transformer, (x, conditions) = make_random_transformer(), make_inputs()
    adaptation = LoRA(rank=2, targets=TARGETS)(transformer)
    nudge(adaptation.trainable)
    torch._dynamo.reset()
    before = num_compilations()
    eager, compiled = make_network(), make_network(compile=compile)
    with torch.no_grad(), adaptation.merged():
        for t in (T, 0.3):
            assert torch.equal(compiled(transformer, x, t, conditions), eager(transformer, x, t, conditions))
    # double and single blocks
    assert num_compilations() - before == 2
    adaptation.refresh()
    weights = list(adaptation.trainable.values())
    ours, theirs = (
        torch.autograd.grad(network(transformer, x, T, conditions).sum(), weights) for network in (compiled, eager)
    )
    for our, their in zip(ours, theirs, strict=True):
        assert (our - their).abs().max() <= 1e-5 * their.abs().max()


def test_the_targets_are_those_of_flow_grpo(weights: Path) -> None:
    attention = {f"attn.{name}" for name in ("to_q", "to_k", "to_v")}
    text = {f"attn.{name}" for name in ("to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")}
    both = attention | text | {f"{ff}.{name}" for ff in ("ff", "ff_context") for name in ("net.0.proj", "net.2")}
    assert set(make_model(weights).adaptation.lora_config["target_modules"]) == {
        *(f"transformer_blocks.{block}.{name}" for block in (0, 1) for name in both),
        *(f"single_transformer_blocks.{block}.{name}" for block in (0, 1) for name in attention),
    }


@torch.no_grad()
def test_merged_adapters_compute_what_they_do_apart_and_leave_no_trace(weights: Path) -> None:
    model = make_model(weights)
    nudge(model.trainable)
    x, conditions = make_start(), model.encode(TEXTS)
    frozen = {name: weight.clone() for name, weight in model.transformer.state_dict().items()}
    apart = model.velocity(x, T, conditions)
    with model.sampling():
        merged = model.velocity(x, T, conditions)
    assert isinstance(apart, Tensor)
    assert isinstance(merged, Tensor)
    torch.testing.assert_close(merged, apart, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(weight, frozen[name]) for name, weight in model.transformer.state_dict().items())


def test_the_reference_is_the_base_model_to_the_bit_and_the_policy_keeps_its_gradient(weights: Path) -> None:
    base, model = make_model(weights), make_model(weights)
    nudge(model.trainable)
    x, conditions = make_start(), model.encode(TEXTS)
    velocity, reference = model.velocity_and_reference(x, T, conditions)
    assert torch.equal(combined(reference), combined(base.velocity(x, T, conditions)).detach())
    assert (combined(velocity) - combined(reference)).abs().max() > 1e-3
    weights_ = list(model.trainable.values())
    alone = torch.autograd.grad(combined(model.velocity(x, T, conditions)).square().sum(), weights_)
    for ours, expected in zip(torch.autograd.grad(combined(velocity).square().sum(), weights_), alone, strict=True):
        assert torch.equal(ours, expected)


def test_saved_adapters_load_in_diffusers(weights: Path, tmp_path: Path) -> None:
    model = make_model(weights)
    nudge(model.trainable)
    model.save_lora(tmp_path)
    pipeline = FluxPipeline.from_pretrained(weights)
    before = images_of_diffusers(pipeline)
    pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    theirs = images_of_diffusers(pipeline)
    torch.testing.assert_close(images_of_ours(model), theirs, atol=1e-4, rtol=0)
    assert (theirs - before).abs().max() > 1e-3


def test_the_merged_pipeline_gives_the_images_of_the_policy(weights: Path, tmp_path: Path) -> None:
    model = make_model(weights)
    nudge(model.trainable)
    ours = images_of_ours(model)
    model.save_merged(tmp_path)
    torch.testing.assert_close(ours, images_of_diffusers(FluxPipeline.from_pretrained(tmp_path)), atol=1e-4, rtol=0)


TINY = [
    "model=flux_dev",
    "compile=eager",
    "runtime=default",
    "algorithm/schedule=flux",
    "algorithm.schedule.num_steps=4",
    "model.resolution=64",
    "model.dtype=float32",
    "model.decode_dtype=float32",
    "model.max_sequence_length=7",
    "model.condition_cache=null",
    f"+adaptation.targets=[{','.join(TARGETS)}]",
]
SHORT_WINDOW = ["algorithm.timesteps.size=2", "algorithm.timesteps.high=3"]
RECIPES = [
    pytest.param(["algorithm=flow_grpo"], id="flow_grpo"),
    pytest.param(["algorithm=flow_grpo_fast", *SHORT_WINDOW], id="flow_grpo_fast"),
    pytest.param(["algorithm=smart_grpo", *SHORT_WINDOW], id="smart_grpo"),
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_trains_with_a_ratio_of_exactly_one(recipe: list[str], weights: Path, tmp_path: Path) -> None:
    trainer = build_trainer(load_config("train", make_overrides(weights, tmp_path / "run", *TINY, *recipe)))
    start = {name: weight.detach().clone() for name, weight in trainer.model.trainable.items()}
    for _ in range(2):
        assert trainer.step()["ratio_deviation"] == 0
    assert not [name for name, weight in trainer.model.trainable.items() if torch.equal(weight, start[name])]


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_doctor_finds_a_ratio_of_exactly_one(recipe: list[str], weights: Path) -> None:
    config = load_config("doctor", [*TINY, *recipe, f"model.weights={weights}", "runtime.device=cpu"])
    stats = replayed(config)
    assert (stats.deviation_name, stats.deviation) == ("ratio_deviation", 0)


def test_the_experiment_is_flow_grpos() -> None:
    config = load_config("train", ["experiment=flow_grpo_flux", "prompts.path=a", "prompts.held_out=b"])
    algorithm: Algorithm = build(config.algorithm)
    # 512x512 pixels are 1024 tokens: mu = .5 + .65 * (1024 - 256) / (4096 - 256) = .63
    assert algorithm.grid == pytest.approx(LinearSchedule(6, shift=math.exp(0.63))())
    assert algorithm.steps(6, 0, 0) == (0, 1, 2, 3, 4)
    # at t = 1/2 with steps of 1/4 and a flat grid: std = .9 sqrt(t / (1 - t)) sqrt(1/4)
    assert algorithm.dynamics((1.0, 0.75, 0.5, 0.25, 0.0), 2).std == pytest.approx(0.45)
    assert algorithm.objective.kl_coef == 0
    adaptation = build(config.adaptation)(make_transformer())
    assert adaptation.lora_config["r"] == 64
    assert adaptation.lora_config["lora_alpha"] == 128
    expected = LoRA(targets=TARGETS)(make_transformer()).lora_config["target_modules"]
    assert adaptation.lora_config["target_modules"] == expected


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"use_t5": False}, "FLUX reads texts through T5; leave out model.use_t5=false"),
        ({"max_sequence_length": 0}, r"model\.max_sequence_length must lie in 1 to 512, .* got 0"),
    ],
)
def test_texts_need_t5(setting: dict[str, Any], message: str, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Flux, "_make_pipeline", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=message):
        make_model(weights, **setting)


def test_resolutions_are_bounded_by_no_table(weights: Path) -> None:
    with pytest.raises(
        ValueError, match=r"model\.resolution=72: .* must be multiples of 16; 64 and 80 are the nearest to 72"
    ):
        make_model(weights, resolution=72)
    assert make_model(weights, resolution=8192).latent_shape == (16, 1024, 1024)
