"""FLUX.2 klein trains, whole or by adapters, in one process or spread over ranks; and in its published sizes."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastgrpo.algorithm.schedule import Flux2Schedule
from fastgrpo.assembly import build_trainer
from fastgrpo.config import load_config
from fastgrpo.distributed.world import World
from fastgrpo.models.adaptation import FullFineTuning
from fastgrpo.models.architectures import Architecture
from fastgrpo.models.flux2 import Flux2Klein
from fastgrpo.pieces import build, build_partial
from fastgrpo_kernels import combined
from tests.models.test_sharding import TOLERANCE, Case, Trained, train
from tests.ranks import Ranks, ranks_of_module
from tests.tiny_config import make_overrides
from tests.tiny_flux2 import LENGTH, TARGETS, make_model, make_pipeline

on_ranks = ranks_of_module()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("weights") / "flux2")


TINY = [
    "model=flux2_klein",
    "adaptation=lora_flux2",
    "compile=eager",
    "runtime=default",
    "algorithm/schedule=flux2",
    "algorithm.schedule.num_steps=4",
    "model.resolution=64",
    "model.dtype=float32",
    "model.decode_dtype=float32",
    f"model.max_sequence_length={LENGTH}",
    "model.condition_cache=null",
]
SHORT_WINDOW = ["algorithm.timesteps.size=2", "algorithm.timesteps.high=3"]
RECIPES = {
    "flow_grpo": [],
    "flow_grpo_fast": SHORT_WINDOW,
    "smart_grpo": SHORT_WINDOW,
    # images are learned from without guidance
    "nft": ["model.guidance_scale=1"],
    "awm": ["model.guidance_scale=1"],
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_trains(recipe: str, weights: Path, tmp_path: Path) -> None:
    settings = [f"algorithm={recipe}", *TINY, *RECIPES[recipe]]
    trainer = build_trainer(load_config("train", make_overrides(weights, tmp_path / "run", *settings)))
    start = {name: weight.detach().clone() for name, weight in trainer.model.trainable.items()}
    for _ in range(2):
        # images that are learned from have no ratio
        assert trainer.step().get("ratio_deviation", 0) == 0
    assert not [name for name, weight in trainer.model.trainable.items() if torch.equal(weight, start[name])]


def test_full_fine_tuning_trains_all_weights(weights: Path, tmp_path: Path) -> None:
    settings = [setting for setting in TINY if setting != "adaptation=lora_flux2"]
    overrides = [
        one for one in make_overrides(weights, tmp_path / "run", *settings) if not one.startswith("adaptation.")
    ]
    trainer = build_trainer(load_config("train", ["adaptation=full", *overrides]))
    start = {name: weight.detach().clone() for name, weight in trainer.model.trainable.items()}
    for _ in range(2):
        assert trainer.step()["ratio_deviation"] == 0
    assert {name.rpartition(".")[0] for name in start} >= {
        "double_stream_modulation_img.linear",
        "double_stream_modulation_txt.linear",
        "single_stream_modulation.linear",
        "time_guidance_embed.timestep_embedder.linear_1",
        "norm_out.linear",
    }
    assert not [name for name, weight in trainer.model.trainable.items() if torch.equal(weight, start[name])]


class KleinCase(Case):
    def make(self) -> Flux2Klein:
        settings: dict[str, Any] = {"adaptation": self.piece, "dtype": "float64", **dict(self.settings)}
        return make_model(self.weights, **settings)


def test_two_ranks_with_parts_of_the_weights_train_as_one_process_with_all(weights: Path, on_ranks: Ranks) -> None:
    spread = KleinCase(weights, FullFineTuning(rollout_weights="sharded"), (("checkpointing", True),), ranks_of_node=2)
    alone = train(World(), KleinCase(weights))
    ranks: list[Trained] = on_ranks(2, train, spread)
    for name in ("velocities_BSCHW", "reference_BCHW"):
        found = np.concatenate([getattr(rank, name) for rank in ranks])
        np.testing.assert_allclose(found, getattr(alone, name), atol=TOLERANCE, rtol=0)
    for rank in ranks:
        assert rank.grad_norms == pytest.approx(alone.grad_norms, rel=TOLERANCE)
        for kind in ("gradients", "weights", "averages"):
            found, expected = getattr(rank, kind), getattr(alone, kind)
            assert found.keys() == expected.keys()
            for name in expected:
                np.testing.assert_allclose(found[name], expected[name], atol=TOLERANCE, rtol=TOLERANCE)
    assert np.abs(alone.velocities_BSCHW[:, 0] - alone.velocities_BSCHW[:, 1]).max() > 1e-3


# parameters of the transformers of 4B and 9B, and of the autoencoder that both have
SIZES = {"flux2_klein": 3_875_544_576, "flux2_klein_distilled": 3_875_544_576, "flux2_klein_9b": 9_078_581_248}
AUTOENCODER_SIZE = 84_046_115


@pytest.mark.parametrize(("name", "num_parameters"), SIZES.items())
def test_the_sizes_are_the_published_ones(name: str, num_parameters: int) -> None:
    sizes: Architecture = build(load_config("train", [f"model={name}"]).model.architecture)
    with torch.device("meta"):
        transformer = Flux2Transformer2DModel(**sizes.sizes("transformer", Flux2Transformer2DModel))
        autoencoder = AutoencoderKLFlux2(**sizes.sizes("autoencoder", AutoencoderKLFlux2))
    assert sum(weight.numel() for weight in transformer.parameters()) == num_parameters
    assert sum(weight.numel() for weight in autoencoder.parameters()) == AUTOENCODER_SIZE


class TypesOfProducts(TorchDispatchMode):
    """The types of what products and attention return."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **kwargs or {})
        if any(word in str(function) for word in ("mm", "convolution", "attention")):
            first = result[0] if isinstance(result, tuple) else result
            self.found[first.dtype] += 1
        return result


@pytest.mark.parametrize("depth", ["two blocks", pytest.param("all blocks", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SIZES)
def test_a_full_size_model_gives_a_velocity_its_gradient_and_an_image(name: str, depth: str) -> None:
    shorter = ["num_layers=1", "num_single_layers=1"] if depth == "two blocks" else []
    shorter = [f"model.architecture.transformer.{size}" for size in shorter]
    config = load_config("train", [f"model={name}", "adaptation=lora_flux2", "model.weights=random", *shorter])
    # shapes and types without a single value
    with FakeTensorMode():
        model: Flux2Klein = build_partial(config.model, "adaptation")(adaptation=build(config.adaptation))
        x, conditions = torch.randn(2, *model.latent_shape), model.encode(["a red circle", "two blue squares"])
        with TypesOfProducts() as types, torch.no_grad(), model.sampling():
            model.velocity(x, 0.7, conditions)
            images = model.decode(x)
        v = combined(model.velocity(x, 0.7, conditions))
        v.float().sum().backward()
    # adapters are merged in float32, into weights of bfloat16
    num_adapters = len(model.trainable) // 2
    assert types.found.pop(torch.float32) == num_adapters == (10 if shorter else num_adapters)
    assert types.found.keys() == {torch.bfloat16}
    assert conditions.embeds_BLC.shape == (2, 512, config.model.architecture.transformer.joint_attention_dim)
    assert conditions.pooled_BC.shape == (2, 0)
    assert v.shape == x.shape == (2, 128, 32, 32)
    assert {weight.dtype for weight in model.transformer.parameters() if not weight.requires_grad} == {torch.bfloat16}
    assert images.shape == (2, 3, 512, 512)
    assert model.has_two_branches == (name != "flux2_klein_distilled")
    gradients = {name: weight.grad for name, weight in model.trainable.items()}
    assert all(grad is not None and grad.shape == model.trainable[name].shape for name, grad in gradients.items())


def test_the_miniature_trains_without_any_file(tmp_path: Path) -> None:
    settings = ["model=flux2_klein_miniature", "adaptation=lora_flux2", "algorithm/schedule=flux2"]
    small = ["model.resolution=32", "model.architecture.transformer.num_single_layers=2"]
    trainer = build_trainer(load_config("train", make_overrides(Path("random"), tmp_path / "run", *settings, *small)))
    for _ in range(2):
        metrics = trainer.step()
        assert metrics["ratio_deviation"] == 0
        assert metrics["grad_norm"] > 0


@pytest.mark.parametrize(
    ("name", "num_steps", "has_guidance"), [("flux2_klein", 10, True), ("flux2_klein_distilled", 4, False)]
)
def test_a_model_brings_its_times_and_its_adapters(name: str, num_steps: int, has_guidance: bool) -> None:
    config = load_config("train", [f"model={name}"])
    assert build(config.algorithm.schedule) == Flux2Schedule(num_steps, 512)
    assert tuple(config.adaptation.targets) == TARGETS
    assert (config.model.guidance_scale > 1) == has_guidance
    # batches are planned and blocks compiled
    assert (config.runtime.micro_batch, config.compile._target_.rpartition(".")[2]) == (0, "CompiledBlocks")
