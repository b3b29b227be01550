"""Our Z-Image is diffusers': images, velocities, gradients and LoRA files, of texts that are of unlike lengths."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImagePipeline
from torch import Tensor

from fastgrpo.algorithm.schedule import LinearSchedule
from fastgrpo.compile.blocks import num_compilations
from fastgrpo.memory.batches import BatchSizes
from fastgrpo.models.attention import attention_backend
from fastgrpo.models.blocks.modulation import Modulations
from fastgrpo.models.lora import ATTENTION, LoRA
from fastgrpo.models.random_weights import random_module
from fastgrpo.models.z_image import ZImage, ZImageNetwork
from fastgrpo.sampler import Sampler
from fastgrpo.types import Conditions, Prompts, Samples
from fastgrpo_kernels import combined
from tests.tiny_z_image import PROMPTS, SHIFT, TEXT_WIDTH, make_pipeline, make_transformer

TEXTS = list(PROMPTS)
# all that a block has
TARGETS = (*ATTENTION, "w1", "w2", "w3")
T = 0.3
# as its authors write it
GUIDANCE = 2.5
# height and width of latents: 24 and 60 tokens, filled up to 32 and 64, and 32, which are not
SHAPES = [(12, 8), (10, 24), (8, 16)]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("weights") / "z_image")


def make_model(weights: Path, **settings: Any) -> ZImage:
    defaults: dict[str, Any] = {
        "weights": str(weights),
        "adaptation": LoRA(rank=2, alpha=4.0, targets=TARGETS),
        "resolution": 64,
        "guidance_scale": 1 + GUIDANCE,
        "max_sequence_length": 64,
    }
    return ZImage(**defaults | settings)


def make_start(height: int = 64, width: int = 64) -> Tensor:
    return torch.randn(3, 16, height // 8, width // 8, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def nudge(trainable: dict[str, torch.nn.Parameter]) -> None:
    """Adapters that matter: they start at zero."""
    generator = torch.Generator().manual_seed(2)
    for weight in trainable.values():
        weight.add_(0.05 * torch.randn(weight.shape, generator=generator))


def images_of_ours(model: ZImage, height: int = 64, width: int = 64) -> Tensor:
    # one batch, in which texts are filled up to 32 and to 64 tokens
    sampler = Sampler(model=model, grid=LinearSchedule(4, SHIFT)(), batch_sizes=BatchSizes.of(3))
    return sampler(Samples.all_of(Prompts(TEXTS, ids=[0, 1, 2]), 1), model.encode(TEXTS), make_start(height, width))


def images_of_diffusers(
    pipeline: ZImagePipeline, guidance_scale: float = GUIDANCE, height: int = 64, width: int = 64
) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    settings: dict[str, Any] = {"num_inference_steps": 4, "max_sequence_length": 64, "output_type": "pt"}
    settings |= {"height": height, "width": width, "guidance_scale": guidance_scale}
    return pipeline(list(TEXTS), latents=make_start(height, width), **settings).images


@pytest.mark.parametrize("guidance", [0.0, GUIDANCE])
def test_the_ode_gives_the_images_of_diffusers(guidance: float, weights: Path) -> None:
    ours = images_of_ours(make_model(weights, guidance_scale=1 + guidance))
    theirs = images_of_diffusers(ZImagePipeline.from_pretrained(weights), guidance)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    # the images are no constant, and depend on guidance
    assert ours.std() > 0.01
    assert (ours - images_of_ours(make_model(weights, guidance_scale=2 + guidance))).abs().max() > 1e-3


@pytest.mark.parametrize(("height", "width"), [(32, 96), (112, 48)])
def test_images_that_are_not_square_are_those_of_diffusers(height: int, width: int, weights: Path) -> None:
    model = make_model(weights, resolution=[height, width])
    assert model.latent_shape == (16, height // 8, width // 8)
    ours = images_of_ours(model, height, width)
    theirs = images_of_diffusers(ZImagePipeline.from_pretrained(weights), height=height, width=width)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_a_text_is_read_by_its_template_and_is_as_long_as_it_is(weights: Path) -> None:
    conditions = make_model(weights).encode(TEXTS)
    pipeline = ZImagePipeline.from_pretrained(weights)
    expected, _ = pipeline.encode_prompt(list(TEXTS), do_classifier_free_guidance=False, max_sequence_length=64)
    assert conditions.lengths_B.tolist() == [len(row) for row in expected] == [5, 32, 44]
    assert conditions.embeds_BLC.shape == (3, 64, TEXT_WIDTH)
    assert conditions.pooled_BC.shape == (3, 0)
    for ours_MC, theirs_MC in zip(conditions.embeds_BLC, expected, strict=True):
        torch.testing.assert_close(ours_MC[: len(theirs_MC)], theirs_MC, atol=1e-5, rtol=1e-5)
        assert not ours_MC[len(theirs_MC) :].any()


def make_network(**settings: Any) -> ZImageNetwork:
    defaults: dict[str, Any] = {"compile": lambda function: function, "checkpointing": False}
    return ZImageNetwork(
        attention=attention_backend("sdpa"), modulations=Modulations(is_frozen=True), **defaults | settings
    )


def make_inputs(
    dtype: torch.dtype = torch.float32, shape: tuple[int, int] = SHAPES[0], lengths: tuple[int, ...] = (33, 7, 64)
) -> tuple[Tensor, Conditions]:
    generator = torch.Generator().manual_seed(1)
    x_BCHW = torch.randn(len(lengths), 16, *shape, generator=generator)
    # what fills a text up is not read, whatever it is
    embeds_BMC = torch.randn(len(lengths), 64, TEXT_WIDTH, generator=generator).to(dtype)
    lengths_B = torch.tensor(lengths, dtype=torch.int32)
    keys = tuple(range(len(lengths)))
    return x_BCHW, Conditions(embeds_BMC, embeds_BMC.new_empty(len(lengths), 0), keys, lengths_B=lengths_B)


def diffusers_velocity(transformer: Any, x_BCHW: Tensor, t: float | Tensor, conditions: Conditions) -> Tensor:
    t_B = t if isinstance(t, Tensor) else torch.full((len(x_BCHW),), t)
    lengths = conditions.lengths_B.tolist()
    texts = [row[:length] for row, length in zip(conditions.embeds_BLC, lengths, strict=True)]
    frames = list(x_BCHW.to(transformer.dtype).unsqueeze(2))
    return -torch.stack(transformer(frames, 1 - t_B, texts, return_dict=False)[0]).squeeze(2)


def make_random_transformer(dtype: torch.dtype = torch.float32) -> Any:
    transformer = random_module(make_transformer, device="cpu", dtype=dtype, seed=0)
    with torch.no_grad():
        for name, weight in transformer.named_parameters():
            if "norm" in name:
                weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(5)))
    return transformer


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("t", [T, torch.tensor([0.9, 0.2, 0.6])], ids=["one time", "a time a sample"])
def test_the_velocity_is_that_of_diffusers(
    t: float | Tensor, shape: tuple[int, int], dtype: torch.dtype, tolerance: float
) -> None:
    transformer, (x, conditions) = make_random_transformer(dtype), make_inputs(dtype, shape)
    ours = make_network()(transformer, x, t, conditions)
    theirs = diffusers_velocity(transformer, x, t, conditions)
    assert ours.dtype == theirs.dtype == dtype
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(64, 64, 64), (1, 2, 3), (32, 31, 33)], ids=str)
def test_every_length_of_a_text_is_that_of_diffusers(lengths: tuple[int, ...]) -> None:
    transformer, (x, conditions) = make_random_transformer(), make_inputs(lengths=lengths)
    ours, theirs = (velocity(transformer, x, T, conditions) for velocity in (make_network(), diffusers_velocity))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_network_keeps_the_places_of_shapes_apart() -> None:
    transformer, network = make_random_transformer(), make_network()
    for shape in ((12, 8), (8, 12), (16, 6)):
        x, conditions = make_inputs(shape=shape)
        theirs = diffusers_velocity(transformer, x, T, conditions)
        torch.testing.assert_close(network(transformer, x, T, conditions), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_is_that_of_diffusers(checkpointing: bool) -> None:
    # in double precision, which rounding does not blur
    transformer, (x, conditions) = make_random_transformer(torch.float64), make_inputs(torch.float64)
    adaptation = LoRA(rank=2, alpha=4.0, targets=TARGETS)(transformer)
    nudge(adaptation.trainable)
    cotangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    weights = list(adaptation.trainable.values())
    network = make_network(checkpointing=checkpointing)
    adaptation.stack(network.stacks(transformer))
    for block in (*transformer.noise_refiner, *transformer.context_refiner, *transformer.layers):
        # queries, keys and values, and what the feed-forward multiplies, are one product each
        assert len(block.attention.to_v.stack.widths) == 3
        assert len(block.feed_forward.w3.stack.widths) == 2
    ours = torch.autograd.grad(network(transformer, x, T, conditions), weights, cotangent)
    # diffusers' blocks take the same layers, adapters and all
    theirs = torch.autograd.grad(diffusers_velocity(transformer, x, T, conditions), weights, cotangent)
    for name, our, their in zip(adaptation.trainable, ours, theirs, strict=True):
        assert their.any(), name
        assert (our - their).abs().max() <= 1e-5 * their.abs().max(), name


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_each_kind_of_block_is_compiled_once_and_computes_the_same(backend: str) -> None:
    def compile(function: Callable[..., Any]) -> Callable[..., Any]:
        # traced and guarded as ever, by aot_eager differentiated too, and run by PyTorch's own kernels
        return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)

    transformer = make_random_transformer()
    adaptation = LoRA(rank=2, targets=TARGETS)(transformer)
    nudge(adaptation.trainable)
    torch._dynamo.reset()
    before = num_compilations()
    eager, compiled = make_network(), make_network(compile=compile)
    with torch.no_grad(), adaptation.merged():
        # at another time, and with texts of other lengths, nothing is compiled again
        for t, lengths in ((T, (33, 7, 64)), (0.8, (1, 40, 32))):
            x, conditions = make_inputs(lengths=lengths)
            assert torch.equal(compiled(transformer, x, t, conditions), eager(transformer, x, t, conditions))
    # of the image, of the text, and of both
    assert num_compilations() - before == 3
    adaptation.refresh()
    weights = list(adaptation.trainable.values())
    ours, theirs = (
        torch.autograd.grad(network(transformer, x, T, conditions).sum(), weights) for network in (compiled, eager)
    )
    for our, their in zip(ours, theirs, strict=True):
        assert (our - their).abs().max() <= 1e-5 * their.abs().max()


def test_flow_grpos_targets_are_the_attention_of_all_blocks(weights: Path) -> None:
    blocks = ("noise_refiner.0", "context_refiner.0", "layers.0", "layers.1")
    layers = ("to_q", "to_k", "to_v", "to_out.0")
    model = make_model(weights, adaptation=LoRA(rank=2))
    expected = {f"{block}.attention.{layer}" for block in blocks for layer in layers}
    assert set(model.adaptation.lora_config["target_modules"]) == expected


@torch.no_grad()
def test_merged_adapters_compute_what_they_do_apart_and_leave_no_trace(weights: Path) -> None:
    model = make_model(weights)
    nudge(model.trainable)
    x, conditions = make_start(), model.encode(TEXTS)
    frozen = {name: weight.clone() for name, weight in model.transformer.state_dict().items()}
    apart = combined(model.velocity(x, T, conditions))
    with model.sampling():
        merged = combined(model.velocity(x, T, conditions))
    torch.testing.assert_close(merged, apart, atol=2e-5, rtol=1e-5)
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
    pipeline = ZImagePipeline.from_pretrained(weights)
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
    torch.testing.assert_close(ours, images_of_diffusers(ZImagePipeline.from_pretrained(tmp_path)), atol=1e-4, rtol=0)
