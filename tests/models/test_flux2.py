"""Our FLUX.2 klein is diffusers': images, velocities, gradients and LoRA files; what it reads and refuses to read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from safetensors.torch import load_file
from torch import Tensor

from fastgrpo.algorithm.schedule import Flux2Schedule
from fastgrpo.compile.blocks import num_compilations
from fastgrpo.config import load_config
from fastgrpo.memory.batches import BatchSizes
from fastgrpo.models.attention import attention_backend
from fastgrpo.models.blocks.modulation import Modulations
from fastgrpo.models.flux2 import Flux2Klein, Flux2Network
from fastgrpo.models.fp8 import Fp8
from fastgrpo.models.lora import LoRA
from fastgrpo.models.random_weights import random_module
from fastgrpo.pieces import build_partial
from fastgrpo.sampler import Sampler
from fastgrpo.types import Conditions, Prompts, Samples, Time
from fastgrpo_kernels import combined
from tests.tiny import PROMPTS
from tests.tiny_flux2 import (
    GUIDANCE,
    LENGTH,
    NUM_TEMPLATE_TOKENS,
    TARGETS,
    TEXT_WIDTH,
    make_model,
    make_pipeline,
    make_transformer,
    nudge,
    unlike_scales,
)

# of 12, 16 and 16 bytes
TEXTS = list(PROMPTS[:3])
T = 0.5


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("weights") / "flux2")


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("weights") / "flux2_distilled", is_distilled=True)


def make_start(num_samples: int = 3) -> Tensor:
    return torch.randn(num_samples, 16, 4, 4, generator=torch.Generator().manual_seed(3))


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
    transformer = random_module(make_transformer, device="cpu", dtype=dtype, seed=0)
    unlike_scales(transformer)
    return transformer


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)], ids=str)
@pytest.mark.parametrize("t", [T, torch.tensor([0.3, 0.9])], ids=["one time", "times"])
def test_the_velocity_is_that_of_diffusers(t: Time, dtype: torch.dtype, tolerance: float) -> None:
    transformer, (x, conditions) = make_random_transformer(dtype), make_inputs(dtype)
    ours, theirs = make_network()(transformer, x, t, conditions), diffusers_velocity(transformer, x, t, conditions)
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
    # queries, keys and values of image and of text; in single-stream blocks they are one layer
    assert [len(block.attn.to_v.stack.widths) for block in transformer.transformer_blocks] == [3, 3]
    assert [len(block.attn.add_v_proj.stack.widths) for block in transformer.transformer_blocks] == [3, 3]
    t = torch.tensor([T, 0.9])
    ours = torch.autograd.grad(network(transformer, x, t, conditions), weights, cotangent)
    # diffusers' blocks take the same layers, adapters and all
    theirs = torch.autograd.grad(diffusers_velocity(transformer, x, t, conditions), weights, cotangent)
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


def test_the_targets_are_the_attention_of_both_kinds_of_blocks(weights: Path) -> None:
    double = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    assert set(make_model(weights).adaptation.lora_config["target_modules"]) == {
        *(f"transformer_blocks.{block}.attn.{name}" for block in (0, 1) for name in double),
        *(
            f"single_transformer_blocks.{block}.attn.{name}"
            for block in (0, 1)
            for name in ("to_qkv_mlp_proj", "to_out")
        ),
    }


@torch.no_grad()
def test_merged_adapters_compute_what_they_do_apart_and_leave_no_trace(weights: Path) -> None:
    model = make_model(weights)
    nudge(model.trainable)
    x, conditions = make_start(), model.encode(TEXTS)
    frozen = {name: weight.clone() for name, weight in model.transformer.state_dict().items()}
    apart = combined(model.velocity(x, T, conditions))
    with model.sampling():
        merged = combined(model.velocity(x, T, conditions))
    torch.testing.assert_close(merged, apart, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(weight, frozen[name]) for name, weight in model.transformer.state_dict().items())


def test_the_reference_is_the_base_model_to_the_bit_and_the_policy_keeps_its_gradient(weights: Path) -> None:
    base, model = make_model(weights), make_model(weights)
    nudge(model.trainable)
    x, conditions = make_start(), model.encode(TEXTS)
    velocity, reference = model.velocity_and_reference(x, T, conditions)
    assert torch.equal(combined(reference), combined(base.velocity_and_reference(x, T, conditions)[1]))
    torch.testing.assert_close(combined(reference), combined(base.velocity(x, T, conditions)).detach())
    assert (combined(velocity) - combined(reference)).abs().max() > 1e-3
    weights_ = list(model.trainable.values())
    alone = torch.autograd.grad(combined(model.velocity(x, T, conditions)).square().sum(), weights_)
    for ours, expected in zip(torch.autograd.grad(combined(velocity).square().sum(), weights_), alone, strict=True):
        torch.testing.assert_close(ours, expected)


def test_saved_adapters_load_in_diffusers(weights: Path, tmp_path: Path) -> None:
    model = make_model(weights)
    nudge(model.trainable)
    model.save_lora(tmp_path)
    pipeline = Flux2KleinPipeline.from_pretrained(weights)
    before = images_of_diffusers(pipeline)
    pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    theirs = images_of_diffusers(pipeline)
    torch.testing.assert_close(images_of_ours(model), theirs, atol=1e-4, rtol=0)
    assert (theirs - before).abs().max() > 1e-3
    # each by its name and with its values, not one for another; alpha / rank, which is 2, is in B
    loaded = Flux2KleinPipeline.lora_state_dict(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    assert loaded.keys() == {f"transformer.{name}" for name in model.trainable}
    for name, weight in model.trainable.items():
        assert torch.equal(loaded[f"transformer.{name}"], 2 * weight if "lora_B" in name else weight)


def test_the_merged_pipeline_gives_the_images_of_the_policy(distilled: Path, tmp_path: Path) -> None:
    model = make_model(distilled, guidance_scale=1.0)
    nudge(model.trainable)
    ours = images_of_ours(model)
    model.save_merged(tmp_path)
    merged = Flux2KleinPipeline.from_pretrained(tmp_path)
    # with guidance, which it still leaves out
    torch.testing.assert_close(ours, images_of_diffusers(merged), atol=1e-4, rtol=0)


def test_decoding_in_half_precision_normalizes_by_the_statistics_that_are_stored(weights: Path) -> None:
    stored = load_file(weights / "vae" / "diffusion_pytorch_model.safetensors")
    model = make_model(weights, decode_dtype="bfloat16")
    autoencoder = model.pipeline.vae
    assert torch.equal(autoencoder.bn.running_mean, stored["bn.running_mean"])
    assert torch.equal(autoencoder.bn.running_var, stored["bn.running_var"])
    assert {weight.dtype for weight in autoencoder.parameters()} == {torch.bfloat16}
    assert autoencoder.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    x_BCHW = torch.randn(2, 16, 3, 5, generator=torch.Generator().manual_seed(0))
    # by hand: normalized in float32, decoded in half precision
    variance_C11 = stored["bn.running_var"][:, None, None] + 1e-4
    z_BCHW = x_BCHW * variance_C11.sqrt() + stored["bn.running_mean"][:, None, None]
    half = AutoencoderKLFlux2.from_pretrained(weights, subfolder="vae", torch_dtype=torch.bfloat16)
    half.to(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = half.decode(Flux2KleinPipeline._unpatchify_latents(z_BCHW).bfloat16()).sample.float() / 2 + 0.5
    found = model.decode(x_BCHW)
    assert found.shape == (2, 3, 48, 80)
    assert torch.equal(found, expected.clamp(0, 1))


@torch.no_grad()
def test_what_fills_up_a_text_is_seen(weights: Path) -> None:
    long, short = (make_model(weights, max_sequence_length=length) for length in (LENGTH, LENGTH - 1))
    conditions = long.encode(TEXTS[:1])
    assert conditions.embeds_BLC.shape == (1, LENGTH, 3 * TEXT_WIDTH)
    assert conditions.lengths_B.tolist() == [LENGTH]
    velocities = [combined(model.velocity(make_start(1), T, model.encode(TEXTS[:1]))) for model in (long, short)]
    assert (velocities[0] - velocities[1]).abs().max() > 1e-4


def test_a_text_that_would_be_cut_is_refused(weights: Path) -> None:
    text = "a" * (LENGTH - NUM_TEMPLATE_TOKENS)
    model = make_model(weights)
    assert model.encode([text]).embeds_BLC.shape[1] == LENGTH
    with pytest.raises(ValueError, match=rf"is {LENGTH + 1} tokens long with its chat template, .* is {LENGTH}; sho"):
        model.encode([text + "a"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"resolution": 72},
            r"model\.resolution=72: height and width must be multiples of 16; 64 and 80 are the nearest to 72",
        ),
        ({"max_sequence_length": 0}, r"model\.max_sequence_length must lie in 1 to 512, .* got 0"),
        ({"max_sequence_length": 513}, r"model\.max_sequence_length must lie in 1 to 512"),
        ({"use_t5": False}, r"model\.use_t5=false, but Flux2Klein has no T5; leave it out"),
    ],
)
def test_settings_that_do_not_go_with_it_are_refused(
    settings: dict[str, Any], message: str, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Flux2Klein, "_make_pipeline", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=message):
        make_model(weights, **settings)


def test_a_transformer_with_guidance_as_an_input_is_refused() -> None:
    settings = ["model=flux2_klein_miniature", "model.architecture.transformer.guidance_embeds=true"]
    config = load_config("train", settings)
    with pytest.raises(ValueError, match=r"takes guidance as an input.*; give the weights of a klein, as"):
        build_partial(config.model, "adaptation")(adaptation=LoRA())


def test_fp8_is_near_and_not_equal(weights: Path) -> None:
    model = make_model(weights, lossy=Fp8(), dtype="bfloat16")
    x, conditions = make_start(), model.encode(TEXTS)
    with model.sampling():
        exact = combined(model.velocity(x, T, conditions)).float()
    with model.sampling(lossy=True):
        lossy = combined(model.velocity(x, T, conditions)).float()
    assert 0 < (lossy - exact).abs().mean() < 0.1 * exact.abs().mean()
