"""Our Qwen-Image and Qwen-Image 2.1 are diffusers': images, velocities, gradients, files of LoRA and of pipelines."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgrpo.algorithm.schedule import FluxSchedule
from fastgrpo.compile.blocks import num_compilations
from fastgrpo.memory.batches import BatchSizes
from fastgrpo.models.attention import attention_backend
from fastgrpo.models.blocks.modulation import Modulations
from fastgrpo.models.lora import LoRA
from fastgrpo.sampler import Sampler
from fastgrpo.types import Prompts, Samples
from fastgrpo_kernels import combined
from tests.qwen_families import FAMILIES, GUIDANCE, NUM_STEPS, QWEN_IMAGE_21, SIZE, TEXTS, Family, batch_images_21

T = 0.5
# as configs/algorithm/schedule/qwen_image.yaml has it
GRID = FluxSchedule(NUM_STEPS, SIZE, max_shift=0.9, max_tokens=8192, terminal=0.02)()


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    found: Family = request.param
    return found


@pytest.fixture(scope="module")
def weights(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family.make_pipeline(tmp_path_factory.mktemp("weights") / family.name)


@torch.no_grad()
def nudge(trainable: dict[str, torch.nn.Parameter]) -> None:
    """Adapters that matter: they start at zero."""
    generator = torch.Generator().manual_seed(2)
    for weight in trainable.values():
        weight.add_(0.05 * torch.randn(weight.shape, generator=generator))


def images_of_ours(family: Family, model: Any, texts: list[str] = TEXTS) -> Tensor:
    sampler = Sampler(model=model, grid=GRID, batch_sizes=BatchSizes.of(2))
    return sampler(Samples.all_of(Prompts(texts, ids=[0, 1]), 1), model.encode(texts), family.make_start())


def images_of_diffusers(family: Family, pipeline: Any, guidance_scale: float = GUIDANCE) -> Tensor:
    return family.images(pipeline, TEXTS, family.make_start(), guidance_scale)


@pytest.mark.parametrize("guidance_scale", [1.0, GUIDANCE])
def test_the_ode_gives_the_images_of_diffusers(guidance_scale: float, family: Family, weights: Path) -> None:
    ours = images_of_ours(family, family.make_model(weights, guidance_scale=guidance_scale))
    theirs = images_of_diffusers(family, family.load(weights), guidance_scale)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    # the images are no constant, and depend on guidance
    assert ours.std() > 0.01
    assert (ours - images_of_ours(family, family.make_model(weights, guidance_scale=2.0))).abs().max() > 1e-3


def test_an_image_that_is_not_square_is_that_of_diffusers(family: Family, weights: Path) -> None:
    model = family.make_model(weights, resolution=[96, 64])
    start = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(3))
    grid = FluxSchedule(NUM_STEPS, [96, 64], max_shift=0.9, max_tokens=8192, terminal=0.02)()
    sampler = Sampler(model=model, grid=grid, batch_sizes=BatchSizes.of(2))
    ours = sampler(Samples.all_of(Prompts(TEXTS, ids=[0, 1]), 1), model.encode(TEXTS), start)
    assert ours.shape == (2, 3, 96, 64)
    theirs = family.images(family.load(weights), TEXTS, start, GUIDANCE)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_a_sample_of_21_does_not_depend_on_the_other_texts_of_its_batch(tmp_path: Path) -> None:
    family = QWEN_IMAGE_21
    weights = family.make_pipeline(tmp_path)
    model, pipeline = family.make_model(weights, guidance_scale=1.0), family.load(weights)
    short, long = images_of_ours(family, model)
    theirs_short, theirs_long = batch_images_21(pipeline, TEXTS, family.make_start(), 1.0)
    torch.testing.assert_close(long, theirs_long, atol=1e-4, rtol=0)
    # in diffusers it does, since the image stands behind the longest of the texts
    assert (short - theirs_short).abs().max() > 1e-3
    alike = ["a red circle", "a green triangle"]
    ours = images_of_ours(family, model, alike)
    torch.testing.assert_close(ours, batch_images_21(pipeline, alike, family.make_start(), 1.0), atol=1e-4, rtol=0)


def make_network(family: Family, **settings: Any) -> Any:
    defaults: dict[str, Any] = {"compile": lambda function: function, "checkpointing": False}
    pieces: dict[str, Any] = {"attention": attention_backend("sdpa"), "modulations": Modulations(is_frozen=True)}
    return family.model.network_class(**defaults | pieces | settings)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)], ids=str)
@pytest.mark.parametrize("t", [T, torch.tensor([0.3, 0.9])], ids=["one time", "a time each"])
def test_the_velocity_is_that_of_diffusers(
    t: float | Tensor, dtype: torch.dtype, tolerance: float, family: Family
) -> None:
    transformer, (x, conditions) = family.make_random_transformer(dtype), family.make_inputs(dtype)
    ours = make_network(family)(transformer, x, t, conditions)
    theirs = family.diffusers_velocity(transformer, x, t, conditions)
    assert ours.dtype == theirs.dtype == dtype
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


@torch.no_grad()
def test_a_21_whose_text_knows_the_time_is_that_of_diffusers() -> None:
    family = QWEN_IMAGE_21
    transformer, (x, conditions) = family.make_random_transformer(causal_condition=False), family.make_inputs()
    ours = make_network(family)(transformer, x, T, conditions)
    torch.testing.assert_close(ours, family.diffusers_velocity(transformer, x, T, conditions), atol=1e-5, rtol=1e-5)
    # the same weights
    causal = family.make_random_transformer()
    assert (ours - make_network(family)(causal, x, T, conditions)).abs().max() > 1e-3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_is_that_of_diffusers(checkpointing: bool, family: Family) -> None:
    # in double precision, which rounding does not blur
    transformer, (x, conditions) = family.make_random_transformer(torch.float64), family.make_inputs(torch.float64)
    adaptation = LoRA(rank=2)(transformer)
    nudge(adaptation.trainable)
    cotangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    network = make_network(family, checkpointing=checkpointing)
    adaptation.stack(network.stacks(transformer))
    # what becomes of the text in the last block, nobody reads
    unread = ("transformer_blocks.1.attn.to_add_out", "transformer_blocks.1.attn.add_q_proj")
    weights = {name: weight for name, weight in adaptation.trainable.items() if not name.startswith(unread)}
    theirs_v = family.diffusers_velocity(transformer, x, T, conditions)
    ours = torch.autograd.grad(network(transformer, x, T, conditions), list(weights.values()), cotangent)
    # diffusers' blocks take the same layers, adapters and all
    theirs = torch.autograd.grad(theirs_v, list(weights.values()), cotangent)
    for name, our, their in zip(weights, ours, theirs, strict=True):
        assert their.any(), name
        assert (our - their).abs().max() <= 1e-5 * their.abs().max(), name


def test_the_targets_are_the_attention_of_every_block(family: Family, weights: Path) -> None:
    names = ["to_q", "to_k", "to_v", "to_out.0"]
    if family.name == "qwen_image":
        names += ["add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    expected = {f"transformer_blocks.{block}.attn.{name}" for block in (0, 1) for name in names}
    assert set(family.make_model(weights).adaptation.lora_config["target_modules"]) == expected
    wide = LoRA(rank=1, targets=("net.0.proj", "net.2", "gate_layer", "proj", "out"))
    adapted = wide(family.make_transformer()).lora_config["target_modules"]
    assert len(adapted) == 2 * {"qwen_image": 4, "qwen_image_21": 3}[family.name]


def test_layers_of_one_input_are_one_product(family: Family) -> None:
    transformer = family.make_random_transformer()
    adaptation = LoRA(rank=2)(transformer)
    adaptation.stack(make_network(family).stacks(transformer))
    block = transformer.transformer_blocks[1]
    stacked = [block.attn.to_q, block.attn.add_q_proj] if family.name == "qwen_image" else [block.attn.to_q]
    assert [len(layer.stack.widths) for layer in stacked] == [3] * len(stacked)
    if family.name == "qwen_image_21":
        assert len(block.img_mlp.gate_layer.stack.widths) == 2


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_each_kind_of_block_is_compiled_once_and_computes_the_same(backend: str, family: Family) -> None:
    def compile(function: Callable[..., Any]) -> Callable[..., Any]:
        # traced and guarded as ever, by aot_eager differentiated too, and run by PyTorch's own kernels
        return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)

    transformer, (x, conditions) = family.make_random_transformer(), family.make_inputs()
    adaptation = LoRA(rank=2)(transformer)
    nudge(adaptation.trainable)
    torch._dynamo.reset()
    before = num_compilations()
    eager, compiled = make_network(family), make_network(family, compile=compile)
    with torch.no_grad(), adaptation.merged():
        for t in (T, 0.3):
            assert torch.equal(compiled(transformer, x, t, conditions), eager(transformer, x, t, conditions))
    assert num_compilations() - before == 1
    adaptation.refresh()
    weights = list(adaptation.trainable.values())
    ours, theirs = (
        torch.autograd.grad(network(transformer, x, T, conditions).sum(), weights, materialize_grads=True)
        for network in (compiled, eager)
    )
    for our, their in zip(ours, theirs, strict=True):
        assert (our - their).abs().max() <= 1e-5 * their.abs().max()


@torch.no_grad()
def test_merged_adapters_compute_what_they_do_apart_and_leave_no_trace(family: Family, weights: Path) -> None:
    model = family.make_model(weights)
    nudge(model.trainable)
    x, conditions = family.make_start(), model.encode(TEXTS)
    frozen = {name: weight.clone() for name, weight in model.transformer.state_dict().items()}
    apart = combined(model.velocity(x, T, conditions))
    with model.sampling():
        merged = combined(model.velocity(x, T, conditions))
    torch.testing.assert_close(merged, apart, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(weight, frozen[name]) for name, weight in model.transformer.state_dict().items())


@pytest.mark.parametrize("guidance_scale", [1.0, GUIDANCE])
def test_the_reference_is_the_base_model_and_the_policy_is_the_same_with_it(
    guidance_scale: float, family: Family, weights: Path
) -> None:
    base, model = (family.make_model(weights, guidance_scale=guidance_scale) for _ in range(2))
    nudge(model.trainable)
    x, conditions = family.make_start(), model.encode(TEXTS)
    velocity, reference = map(combined, model.velocity_and_reference(x, T, conditions))
    # of guidance's branches, those of diffusers are one batch, and ours are another: they are rounded otherwise
    of_base = combined(base.velocity(x, T, conditions)).detach()
    if guidance_scale == 1:
        assert torch.equal(reference, of_base)
    torch.testing.assert_close(reference, of_base, atol=1e-5, rtol=1e-5)
    assert (velocity - reference).abs().max() > 1e-3
    alone = combined(model.velocity(x, T, conditions))
    if family.name == "qwen_image":
        # what update compares with a rollout
        assert torch.equal(velocity, alone)
    weights_ = list(model.trainable.values())
    grads = (torch.autograd.grad(v.square().sum(), weights_, materialize_grads=True) for v in (velocity, alone))
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_saved_adapters_load_in_diffusers(family: Family, weights: Path, tmp_path: Path) -> None:
    model = family.make_model(weights)
    nudge(model.trainable)
    model.save_lora(tmp_path)
    pipeline = family.load(weights)
    before = images_of_diffusers(family, pipeline)
    pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    theirs = images_of_diffusers(family, pipeline)
    torch.testing.assert_close(images_of_ours(family, model), theirs, atol=1e-4, rtol=0)
    assert (theirs - before).abs().max() > 1e-3


def test_the_merged_pipeline_gives_the_images_of_the_policy(family: Family, weights: Path, tmp_path: Path) -> None:
    model = family.make_model(weights)
    nudge(model.trainable)
    ours = images_of_ours(family, model)
    model.save_merged(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in weights.iterdir()}
    merged, published = (json.loads((path / "model_index.json").read_text()) for path in (tmp_path, weights))
    assert published == {key: value for key, value in merged.items() if key != "_name_or_path"}
    torch.testing.assert_close(ours, images_of_diffusers(family, family.load(tmp_path)), atol=1e-4, rtol=0)
