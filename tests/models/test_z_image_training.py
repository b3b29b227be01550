"""Z-Image trains: every kind of recipe, adapters and all weights, in fp8, over ranks, in the published sizes."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastgrpo.assembly import build_trainer
from fastgrpo.commands.doctor import replayed
from fastgrpo.config import load_config
from fastgrpo.distributed.world import World
from fastgrpo.models.architectures import Architecture
from fastgrpo.models.fp8 import Fp8, block_layers
from fastgrpo.models.lora import LoRA
from fastgrpo.models.z_image import ZImage
from fastgrpo.pieces import build, build_partial
from fastgrpo.training import train as train_run
from fastgrpo_kernels import combined
from tests.models.test_sharding import CHECKPOINTING, FULL, Case, assert_agree, train
from tests.ranks import Ranks, ranks_of_module
from tests.tiny_config import make_overrides
from tests.tiny_z_image import PROMPTS, make_pipeline

TEXTS = ["a red circle", "two blue squares, and under each of them one yellow line and a green triangle"]
T = 0.7
SHORT_WINDOW = ["algorithm.timesteps.size=2", "algorithm.timesteps.high=3"]
WITHOUT_GUIDANCE = ["model.guidance_scale=1"]
RECIPES = [
    pytest.param(["algorithm=flow_grpo"], id="flow_grpo"),
    pytest.param(["algorithm=flow_grpo_fast", *SHORT_WINDOW], id="flow_grpo_fast"),
    pytest.param(["algorithm=smart_grpo", *SHORT_WINDOW], id="smart_grpo"),
    pytest.param(["algorithm=nft", *WITHOUT_GUIDANCE], id="nft"),
    pytest.param(["algorithm=awm", *WITHOUT_GUIDANCE], id="awm"),
    pytest.param(["algorithm=flow_grpo", "adaptation=full"], id="flow_grpo-full"),
    pytest.param(["algorithm=nft", "adaptation=full", *WITHOUT_GUIDANCE], id="nft-full"),
]

on_ranks = ranks_of_module()


def overrides_of(recipe: list[str], tmp_path: Path) -> list[str]:
    # 36 image tokens, filled up to 64: that token is trained too
    words = make_overrides(
        Path("random"),
        tmp_path / "run",
        "model=z_image_miniature",
        "model.resolution=96",
        "algorithm.schedule.num_steps=4",
    )
    if "adaptation=full" in recipe:
        words = [word for word in words if not word.startswith("adaptation.")]
    return [*words, *recipe]


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_miniature_trains(recipe: list[str], tmp_path: Path) -> None:
    trainer = build_trainer(load_config("train", overrides_of(recipe, tmp_path)))
    start = {name: weight.detach().clone() for name, weight in trainer.model.trainable.items()}
    for _ in range(2):
        metrics = trainer.step()
        assert metrics["grad_norm"] > 0
        assert metrics.get("ratio_deviation", 0) == 0
        assert ("ratio_deviation" in metrics) == ("algorithm=nft" not in recipe and "algorithm=awm" not in recipe)
    assert not [name for name, weight in trainer.model.trainable.items() if torch.equal(weight, start[name])]


@pytest.mark.parametrize("recipe", [["algorithm=flow_grpo"], ["algorithm=nft", *WITHOUT_GUIDANCE]], ids=str)
def test_the_doctor_finds_that_rollout_and_update_agree(recipe: list[str]) -> None:
    words = ["model=z_image_miniature", "model.resolution=96", "algorithm.schedule.num_steps=4", *recipe]
    deviation = replayed(load_config("doctor", [*words, "runtime.device=cpu"])).deviation
    assert deviation is not None
    assert deviation < 1e-5


@dataclass(frozen=True)
class ZImageCase(Case):
    def make(self) -> ZImage:
        settings: dict[str, Any] = {"weights": str(self.weights), "resolution": 64, "dtype": "float64"}
        return ZImage(
            adaptation=self.piece, guidance_scale=3.5, max_sequence_length=64, **settings | dict(self.settings)
        )


def test_ranks_with_parts_of_the_weights_train_as_one_process_with_all(tmp_path: Path, on_ranks: Ranks) -> None:
    weights = make_pipeline(tmp_path / "z_image")
    alone = train(World(), ZImageCase(weights))
    assert_agree(on_ranks(2, train, ZImageCase(weights, FULL, CHECKPOINTING, 2)), alone)


@torch.no_grad()
def test_blocks_in_fp8_stay_near_the_exact_ones(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"resolution": 64, "guidance_scale": 2.0, "max_sequence_length": 64, "lossy": Fp8()}
    model = ZImage(weights=str(make_pipeline(tmp_path)), adaptation=LoRA(rank=2), **settings)
    names = {name for _, name, _ in block_layers(model.transformer)}
    assert names == {"to_q", "to_k", "to_v", "0", "w1", "w2", "w3"}
    x_BCHW = torch.randn(3, 16, 8, 8, generator=torch.Generator().manual_seed(3))
    velocities = []
    for lossy in (False, True):
        with model.sampling(lossy=lossy):
            velocities.append(combined(model.velocity(x_BCHW, T, model.encode(PROMPTS))))
    exact, rounded = velocities
    assert 1e-3 < (rounded - exact).std() / exact.std() < 0.2


def architecture() -> Architecture:
    return build(load_config("train", ["model=z_image"]).model.architecture)


def test_the_sizes_are_the_published_ones() -> None:
    sizes = architecture()
    with torch.device("meta"):
        transformer = ZImageTransformer2DModel(**sizes.sizes("transformer", ZImageTransformer2DModel))
        autoencoder = AutoencoderKL(**sizes.sizes("autoencoder", AutoencoderKL))
    assert sum(weight.numel() for weight in transformer.parameters()) == 6_154_908_736
    # FLUX's
    assert sum(weight.numel() for weight in autoencoder.parameters()) == 83_819_683


class Products(TorchDispatchMode):
    """The types of all that is multiplied inside."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            self.dtypes |= {part.dtype for part in args if isinstance(part, Tensor)}
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("guidance_scale", [1, 5])
def test_a_full_size_model_gives_a_velocity_its_gradient_and_an_image(guidance_scale: int) -> None:
    shorter = [f"model.architecture.transformer.{key}=1" for key in ("n_layers", "n_refiner_layers")]
    words = ["model=z_image", "model.weights=random", f"model.guidance_scale={guidance_scale}", *shorter]
    # shapes and types without a single value: nothing can be read back to the host
    with FakeTensorMode():
        model = build_partial(load_config("train", words).model, "adaptation")(adaptation=LoRA())
        x_BCHW, conditions = torch.randn(2, *model.latent_shape), model.encode(TEXTS)
        with Products() as products:
            v_BCHW = combined(model.velocity(x_BCHW, T, conditions))
            v_BCHW.float().sum().backward()
        images_BCHW = model.decode(x_BCHW)
    assert products.dtypes == {torch.bfloat16}
    assert (conditions.embeds_BLC.shape, conditions.pooled_BC.shape) == ((2, 64, 2560), (2, 0))
    assert v_BCHW.shape == x_BCHW.shape == (2, 16, 64, 64)
    assert {weight.dtype for weight in model.transformer.parameters() if not weight.requires_grad} == {torch.bfloat16}
    assert images_BCHW.shape == (2, 3, 512, 512)
    assert all(weight.grad.shape == weight.shape for weight in model.trainable.values())


def miniature(**settings: Any) -> ZImage:
    sizes = build(load_config("train", ["model=z_image_miniature"]).model.architecture)
    transformer, autoencoder = (
        settings.pop("transformer", {}),
        {"block_out_channels": [32, 32, 64, 64], "norm_num_groups": 32},
    )
    defaults: dict[str, Any] = {
        "weights": "random",
        "adaptation": LoRA(rank=2),
        "resolution": 64,
        "max_sequence_length": 64,
        "architecture": replace(
            sizes,
            transformer={**sizes.transformer, **transformer},
            autoencoder={**sizes.autoencoder, **autoencoder},
        ),
    }
    return ZImage(**defaults | settings)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_neither_vanish_nor_blow_up(dtype: str) -> None:
    model = miniature(dtype=dtype, decode_dtype=dtype, transformer={"n_layers": 12})
    x_BCHW = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    with model.sampling():
        v_BCHW = combined(model.velocity(x_BCHW, T, model.encode(TEXTS))).float()
    assert 0.5 < v_BCHW.std() < 2
    assert 0.1 < model.decode(x_BCHW).std() < 0.4


@torch.no_grad()
def test_the_velocity_depends_on_text_latent_and_time() -> None:
    model = miniature()
    x_BCHW = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))

    def velocity(x_BCHW: Tensor, t: float, text: str) -> Tensor:
        return combined(model.velocity(x_BCHW, t, model.encode([text])))

    v_BCHW = velocity(x_BCHW, T, TEXTS[0])
    others = ((x_BCHW, T, TEXTS[1]), (x_BCHW.roll(1, 3), T, TEXTS[0]), (x_BCHW, 0.2, TEXTS[0]))
    assert all((velocity(*other) - v_BCHW).std() > 0.05 for other in others)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_sequence_length": 40}, r"multiple of 32 tokens, and model\.max_sequence_length is 40; use 64$"),
        ({"max_sequence_length": 0}, r"model\.max_sequence_length must lie in 1 to 512, .* got 0$"),
        ({"max_sequence_length": 544}, r"model\.max_sequence_length must lie in 1 to 512, .* got 544$"),
        ({"transformer": {"axes_lens": [65, 512, 512]}}, r"is 64, and this transformer has positions for 32 tokens"),
        ({"transformer": {"all_patch_size": [4]}}, r"no patches of 2 x 2 in one frame; use Tongyi-MAI/Z-Image$"),
        ({"transformer": {"siglip_feat_dim": 8}}, r"reads images too \(siglip_feat_dim\); use Tongyi-MAI/Z-Image$"),
        ({"transformer": {"axes_dims": [16, 16, 8]}}, r"ZImageTransformer2DModel cannot be made in these sizes"),
        ({"transformer": {"axes_lens": [128, 4, 512]}, "resolution": 80}, r"height and width must be at most 64"),
        ({"resolution": 72}, r"^model\.resolution=72: height and width must be multiples of 16; 64"),
        ({"use_t5": False}, r"model\.use_t5=false, but ZImage has no T5; leave it out$"),
        ({"guidance_scale": 0.0}, r"model\.guidance_scale must be at least 1, got 0\.0; 1 turns guidance off$"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_in_a_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        miniature(**settings)
    assert "\n" not in str(raised.value)


def test_the_last_positions_are_used_and_a_longer_text_is_refused(tmp_path: Path) -> None:
    assert miniature(transformer={"axes_lens": [66, 4, 4]}).encode(TEXTS).embeds_BLC.shape[1] == 64
    model = ZImage(weights=str(make_pipeline(tmp_path)), adaptation=LoRA(rank=2), resolution=64, max_sequence_length=32)
    assert model.encode(PROMPTS[:2]).lengths_B.tolist() == [5, 32]
    message = rf"^prompt '{PROMPTS[2]}' is 44 tokens long .* is 32; shorten it, or raise .*, up to 512$"
    with pytest.raises(ValueError, match=message):
        model.encode(PROMPTS[2:])


@pytest.mark.parametrize(
    ("name", "weights", "guidance_scale", "shift"),
    [("z_image", "Tongyi-MAI/Z-Image", 5, 6), ("z_image_turbo", "Tongyi-MAI/Z-Image-Turbo", 1, 3)],
)
def test_published_models_bring_their_guidance_and_times(
    name: str, weights: str, guidance_scale: float, shift: float
) -> None:
    config = load_config("train", [f"model={name}"])
    assert (config.model.weights, config.model.guidance_scale) == (weights, guidance_scale)
    assert config.algorithm.schedule.shift == shift
    assert config.runtime.micro_batch == 0


def test_a_text_that_is_too_long_is_found_before_the_run_begins(tmp_path: Path) -> None:
    weights = make_pipeline(tmp_path / "z_image")
    words = ["model=z_image_miniature", f"model.weights={weights}", "model.resolution=64", *WITHOUT_GUIDANCE]
    overrides = make_overrides(weights, tmp_path / "run", *words, "algorithm=nft", "train.iterations=1")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n" * 40 + "two blue squares " * 30 + "\n")
    with pytest.raises(
        ValueError, match=r"^prompt 'two blue squares .* tokens long with its chat template, and model\.max"
    ):
        train_run(load_config("train", overrides))
    assert not list((tmp_path / "run").glob("checkpoints/*"))
