"""Our Qwen-Image is diffusers': images, velocities, gradients and LoRA files; and what its guidance does to training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from torch import Tensor

from fastgrpo.algorithm.schedule import FluxSchedule
from fastgrpo.compile.blocks import num_compilations
from fastgrpo.config import load_config
from fastgrpo.memory.batches import BatchSizes
from fastgrpo.models.adaptation import FullFineTuning
from fastgrpo.models.attention import attention_backend
from fastgrpo.models.blocks.modulation import Modulations
from fastgrpo.models.fp8 import Fp8
from fastgrpo.models.lora import LoRA
from fastgrpo.models.qwen_image import QwenImage, QwenImageNetwork
from fastgrpo.models.random_weights import random_module
from fastgrpo.sampler import Sampler
from fastgrpo.train import build_trainer
from fastgrpo.types import Conditions, Prompts, Samples
from fastgrpo_kernels import combined
from tests.tiny_config import make_overrides
from tests.tiny_qwen_image import LONG, SHORT, TEXT_WIDTH, make_pipeline, make_transformer

# of 8 and of 75 tokens: they are filled up to 64 and to 128
TEXTS = [SHORT, LONG]
T = 0.5
GUIDANCE = 4.0
# as configs/algorithm/schedule/qwen_image.yaml has it
GRID = FluxSchedule(4, 64, max_shift=0.9, max_tokens=8192, terminal=0.02)()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("weights") / "qwen_image")


def make_model(weights: Path, **settings: Any) -> QwenImage:
    defaults: dict[str, Any] = {
        "weights": str(weights),
        "adaptation": LoRA(rank=2, alpha=4.0),
        "resolution": 64,
        "guidance_scale": GUIDANCE,
        "max_sequence_length": 128,
    }
    return QwenImage(**defaults | settings)


def make_start(num_samples: int = 2) -> Tensor:
    return torch.randn(num_samples, 16, 8, 8, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def nudge(trainable: dict[str, torch.nn.Parameter]) -> None:
    """Adapters that matter: they start at zero."""
    generator = torch.Generator().manual_seed(2)
    for weight in trainable.values():
        weight.add_(0.05 * torch.randn(weight.shape, generator=generator))


def images_of_ours(model: QwenImage) -> Tensor:
    sampler = Sampler(model=model, grid=GRID, batch_sizes=BatchSizes.of(2))
    return sampler(Samples.all_of(Prompts(TEXTS, ids=[0, 1]), 1), model.encode(TEXTS), make_start())


def images_of_diffusers(pipeline: QwenImagePipeline, guidance_scale: float = GUIDANCE) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    packed = QwenImagePipeline._pack_latents(make_start(), 2, 16, 8, 8)
    guidance: dict[str, Any] = {"true_cfg_scale": guidance_scale}
    if guidance_scale != 1:
        guidance["negative_prompt"] = ["", ""]
    size = {"num_inference_steps": 4, "height": 64, "width": 64, "output_type": "pt"}
    images: Tensor = pipeline(TEXTS, latents=packed, **guidance, **size).images
    return images


@pytest.mark.parametrize("guidance_scale", [1.0, GUIDANCE])
def test_the_ode_gives_the_images_of_diffusers(guidance_scale: float, weights: Path) -> None:
    ours = images_of_ours(make_model(weights, guidance_scale=guidance_scale))
    theirs = images_of_diffusers(QwenImagePipeline.from_pretrained(weights), guidance_scale)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    # the images are no constant, and depend on guidance
    assert ours.std() > 0.01
    assert (ours - images_of_ours(make_model(weights, guidance_scale=2.0))).abs().max() > 1e-3


def make_network(**settings: Any) -> QwenImageNetwork:
    defaults: dict[str, Any] = {"compile": lambda function: function, "checkpointing": False}
    settings = {"attention": attention_backend("sdpa"), "modulations": Modulations(is_frozen=True)} | settings
    return QwenImageNetwork(**defaults | settings)


def make_inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Conditions]:
    """Two samples that are not square, of 7 and 3 tokens; what fills up the second is no zeros."""
    generator = torch.Generator().manual_seed(1)
    x_BCHW, embeds_BLC = (
        torch.randn(shape, generator=generator) for shape in ((2, 16, 12, 8), (2, 7, TEXT_WIDTH))
    )
    lengths_B = torch.tensor([7, 3], dtype=torch.int32)
    return x_BCHW, Conditions(embeds_BLC.to(dtype), torch.zeros(2, 0, dtype=dtype), (0, 1), lengths_B=lengths_B)


def diffusers_velocity(
    transformer: QwenImageTransformer2DModel, x_BCHW: Tensor, t: float | Tensor, conditions: Conditions
) -> Tensor:
    height, width = x_BCHW.shape[-2:]
    x = QwenImagePipeline._pack_latents(x_BCHW.to(transformer.dtype), len(x_BCHW), 16, height, width)
    num_tokens = conditions.embeds_BLC.shape[1]
    v = transformer(
        hidden_states=x,
        encoder_hidden_states=conditions.embeds_BLC,
        encoder_hidden_states_mask=torch.arange(num_tokens) < conditions.lengths_B[:, None],
        timestep=t if isinstance(t, Tensor) else torch.full((len(x),), t),
        img_shapes=[[(1, height // 2, width // 2)]] * len(x),
        return_dict=False,
    )[0]
    return QwenImagePipeline._unpack_latents(v, 8 * height, 8 * width, 8)[:, :, 0]


def make_random_transformer(dtype: torch.dtype = torch.float32) -> Any:
    return random_module(make_transformer, device="cpu", dtype=dtype, seed=0)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)], ids=str)
@pytest.mark.parametrize("t", [T, torch.tensor([0.3, 0.9])], ids=["one time", "a time each"])
def test_the_velocity_is_that_of_diffusers(t: float | Tensor, dtype: torch.dtype, tolerance: float) -> None:
    transformer, (x, conditions) = make_random_transformer(dtype), make_inputs(dtype)
    ours, theirs = make_network()(transformer, x, t, conditions), diffusers_velocity(transformer, x, t, conditions)
    assert ours.dtype == theirs.dtype == dtype
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_is_that_of_diffusers(checkpointing: bool) -> None:
    # in double precision, which rounding does not blur
    transformer, (x, conditions) = make_random_transformer(torch.float64), make_inputs(torch.float64)
    adaptation = LoRA(rank=2)(transformer)
    nudge(adaptation.trainable)
    cotangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    network = make_network(checkpointing=checkpointing)
    adaptation.stack(network.stacks(transformer))
    # what is left over of the text after the last block, nobody reads
    unread = ("transformer_blocks.1.attn.to_add_out", "transformer_blocks.1.attn.add_q_proj")
    weights = {name: weight for name, weight in adaptation.trainable.items() if not name.startswith(unread)}
    ours = torch.autograd.grad(network(transformer, x, T, conditions), list(weights.values()), cotangent)
    # diffusers' blocks take the same layers, adapters and all
    theirs = torch.autograd.grad(diffusers_velocity(transformer, x, T, conditions), list(weights.values()), cotangent)
    for name, our, their in zip(weights, ours, theirs, strict=True):
        assert their.any(), name
        assert (our - their).abs().max() <= 1e-5 * their.abs().max(), name
