"""Qwen-Image and Qwen-Image 2.1 as models that are trained: guidance, recipes, sizes, ranks, fp8, and bad input."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastgrpo.assembly import build_trainer
from fastgrpo.config import load_config
from fastgrpo.distributed.spread import Spread
from fastgrpo.distributed.world import World
from fastgrpo.models.adaptation import FullFineTuning
from fastgrpo.models.fp8 import Fp8
from fastgrpo.models.lora import LoRA
from fastgrpo.models.qwen_image import QwenImage
from fastgrpo.pieces import build, build_partial
from fastgrpo_kernels import combined
from tests.qwen_families import FAMILIES, GUIDANCE, QWEN_IMAGE, QWEN_IMAGE_21, TEXTS, Family
from tests.ranks import Ranks, ranks_of_module
from tests.tiny import PROMPTS
from tests.tiny_config import make_overrides

T = 0.7
NAMES = [family.name for family in FAMILIES]
on_ranks = ranks_of_module()


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    found: Family = request.param
    return found


@pytest.fixture(scope="module")
def weights(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family.make_pipeline(tmp_path_factory.mktemp("weights") / family.name)


@pytest.fixture(scope="module")
def qwen_image(tmp_path_factory: pytest.TempPathFactory) -> QwenImage:
    model: QwenImage = QWEN_IMAGE.make_model(QWEN_IMAGE.make_pipeline(tmp_path_factory.mktemp("weights")))
    return model


def test_guidance_keeps_the_length_of_each_token(qwen_image: QwenImage) -> None:
    # four tokens of 2 x 2 pixels; w = u + 4 (c - u)
    conditional, unconditional = torch.zeros(2, 1, 16, 4, 4)
    conditional[0, 0, 0, 0], unconditional[0, 0, 0, 0] = 3.0, 1.0
    conditional[0, :2, 0, 2], unconditional[0, 0, 0, 2] = torch.tensor([3.0, 4.0]), 1.0
    conditional[0, :, 2:, :2], unconditional[0, :, 2:, :2] = 1.0, 1.0
    conditional[0, 3, 3, 3], unconditional[0, 2, 2, 2] = 12.0, -1.0
    v = qwen_image.guided(conditional.bfloat16(), unconditional.bfloat16())
    assert v.dtype == torch.float32
    # w = 1 + 4 * 2 = 9 is brought back to 3
    assert v[0, 0, 0, 0] == 3
    # c = (3, 4) is of length 5, w = (9, 16)
    torch.testing.assert_close(v[0, :2, 0, 2], torch.tensor([9.0, 16.0]) * 5 / (9**2 + 16**2) ** 0.5)
    # both branches agree
    torch.testing.assert_close(v[0, :, 2:, :2], torch.ones(16, 2, 2))
    # one number of each branch, at other pixels of a token: w = (48, 3)
    found = torch.stack([v[0, 3, 3, 3], v[0, 2, 2, 2]])
    torch.testing.assert_close(found, torch.tensor([48.0, 3.0]) * 12 / (48**2 + 3**2) ** 0.5)


def test_guidance_is_differentiated_by_the_branch_with_text_alone(qwen_image: QwenImage) -> None:
    generator = torch.Generator().manual_seed(0)
    conditional, unconditional = torch.randn(2, 1, 2, 2, 4, generator=generator, dtype=torch.float64)
    conditional.requires_grad_()
    assert torch.autograd.gradcheck(lambda c: qwen_image.guided(c, unconditional), conditional)
    with torch.no_grad():
        x, conditions = QWEN_IMAGE.make_start(), qwen_image.encode(TEXTS)
        unconditional = qwen_image._run(qwen_image.transformer, T, *qwen_image._without_text(x, conditions))
    v, known = (qwen_image.velocity(x, T, conditions, u) for u in (None, unconditional))
    assert isinstance(v, Tensor)
    assert isinstance(known, Tensor)
    weights = list(qwen_image.trainable.values())
    for found, expected in zip(
        *(torch.autograd.grad(out.sum(), weights, allow_unused=True) for out in (v, known)), strict=True
    ):
        assert (found is None) == (expected is None)
        assert found is None or torch.equal(found, expected)


def test_with_the_reference_each_branch_is_the_batch_that_it_is_in_a_rollout(
    qwen_image: QwenImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[tuple[int, ...]] = []
    run = qwen_image._run

    def spied(transformer: Any, t: Any, x_BCHW: Tensor, conditions: Any) -> Tensor:
        batches.append(conditions.keys)
        return run(transformer, t, x_BCHW, conditions)

    monkeypatch.setattr(qwen_image, "_run", spied)
    x, conditions = QWEN_IMAGE.make_start(), qwen_image.encode(TEXTS)
    without_text = qwen_image.encode(["", ""])
    qwen_image.velocity(x, T, conditions)
    assert batches == [without_text.keys, conditions.keys]
    batches.clear()
    qwen_image.velocity_and_reference(x, T, conditions)
    # it rounds as it did: the reference alone has both branches in one
    assert batches == [without_text.keys, conditions.keys + without_text.keys, conditions.keys]
    batches.clear()
    qwen_image.velocity_and_reference(x, T, conditions, x)
    assert batches == [conditions.keys + without_text.keys, conditions.keys]


@torch.no_grad()
def test_decoding_in_half_precision_is_channels_last_and_near(family: Family, weights: Path) -> None:
    exact, half = (family.make_model(weights, decode_dtype=dtype) for dtype in ("float32", "bfloat16"))
    kernels = [weight for weight in half.decoder.parameters() if weight.ndim == 4 and weight.shape[2:] != (1, 1)]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in kernels)
    assert any(not weight.is_contiguous() for weight in kernels)
    x = 0.3 * family.make_start()
    assert (half.decode(x) - exact.decode(x)).abs().mean() < 2 / 255


RECIPES = [
    pytest.param(["algorithm=flow_grpo"], id="flow_grpo"),
    pytest.param(["algorithm=flow_grpo", "adaptation=full", "train.learning_rate=1e-4"], id="full"),
    pytest.param(["algorithm=flow_grpo_fast"], id="flow_grpo_fast"),
    pytest.param(["algorithm=smart_grpo"], id="smart_grpo"),
    pytest.param(["algorithm=flow_grpo_fast", "train.gradients=reweight"], id="reweight"),
    pytest.param(["algorithm=nft", "model.guidance_scale=1"], id="nft"),
    pytest.param(["algorithm=awm", "model.guidance_scale=1"], id="awm"),
]
WINDOW = ["algorithm.timesteps.size=2", "algorithm.timesteps.high=3"]


def make_trainer(name: str, tmp_path: Path, *overrides: str) -> Any:
    sizes = [f"model={name}_miniature", "model.resolution=32", "model.architecture.transformer.num_layers=2"]
    settings = ["algorithm.schedule.num_steps=4"]
    recipe = [one for one in overrides if one.startswith("algorithm=")]
    window = WINDOW if recipe in (["algorithm=flow_grpo_fast"], ["algorithm=smart_grpo"]) else []
    full = "adaptation=full" in overrides
    made = make_overrides(Path("random"), tmp_path / "run", *sizes, *settings, *window, *overrides)
    if full:
        made = [one for one in made if not one.startswith("adaptation.")]
    return build_trainer(load_config("train", made))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_miniature_trains_by_each_recipe(name: str, recipe: list[str], tmp_path: Path) -> None:
    trainer = make_trainer(name, tmp_path, *recipe)
    start = {name: weight.detach().clone() for name, weight in trainer.model.trainable.items()}
    metrics = trainer.step()
    learns_from_images = recipe[0] in ("algorithm=nft", "algorithm=awm")
    assert metrics["velocity_deviation"] < 1e-5 if learns_from_images else metrics["ratio_deviation"] == 0
    assert metrics["grad_norm"] > 0
    still = {name for name, weight in trainer.model.trainable.items() if torch.equal(weight, start[name])}
    # what becomes of the text in the last block, nobody reads
    unread = [f"transformer_blocks.1.{name}" for name in ("attn.to_add_out", "attn.add_q", "attn.norm_added_q", "txt_")]
    assert not sorted(name for name in still if not name.startswith(tuple(unread)))


@pytest.mark.parametrize("guidance_scale", [1, GUIDANCE])
@pytest.mark.parametrize("name", NAMES)
def test_a_penalty_finds_the_policy_of_the_rollout(name: str, guidance_scale: float, tmp_path: Path) -> None:
    settings = ["algorithm=flow_grpo", "algorithm.objective.kl_coef=0.04", f"model.guidance_scale={guidance_scale}"]
    trainer = make_trainer(name, tmp_path, *settings)
    assert trainer.step()["ratio_deviation"] == 0
    metrics = trainer.step()
    assert metrics["ratio_deviation"] == 0
    assert metrics["kl"] > 0


@pytest.mark.parametrize("solver", ["adams_bashforth", "cached_guidance"])
def test_a_solver_that_reuses_a_branch_is_refused_where_there_is_none(solver: str, tmp_path: Path) -> None:
    words = ("algorithm=flow_grpo_fast", f"solver={solver}", "model.guidance_scale=4")
    if solver == "adams_bashforth":
        assert make_trainer("qwen_image", tmp_path, *words).step()["ratio_deviation"] == 0
        return
    with pytest.raises(ValueError, match=r"^solver=cached_guidance adds up branches of guidance, which QwenImage does"):
        make_trainer("qwen_image", tmp_path, *words)


# parameters of the published transformers, as their hub shows them, and of their autoencoders as diffusers makes them
SIZES = {"qwen_image": (20_430_401_088, 126_892_531), "qwen_image_21": (7_115_124_736, 337_740_404)}


@pytest.mark.parametrize("name", [*NAMES, "qwen_image_21_turbo"])
def test_the_sizes_are_the_published_ones(name: str) -> None:
    sizes = build(load_config("train", [f"model={name}"]).model.architecture)
    family = QWEN_IMAGE if name == "qwen_image" else QWEN_IMAGE_21
    parts = {"transformer": family.model.transformer_class, "autoencoder": family.model.autoencoder_class}
    with torch.device("meta"):
        made = [part(**sizes.sizes(key, part)) for key, part in parts.items()]
    counts = tuple(sum(weight.numel() for weight in module.parameters()) for module in made)
    assert counts == SIZES[family.name]


class Products(TorchDispatchMode):
    """Types that products, convolutions and attention are given."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(part in func.name() for part in ("mm", "conv", "attention", "linear")):
            self.dtypes |= {arg.dtype for arg in args if isinstance(arg, Tensor) and arg.is_floating_point()}
        return func(*args, **kwargs or {})


@contextmanager
def products() -> Iterator[Products]:
    with FakeTensorMode(), Products() as found:
        yield found


@pytest.mark.parametrize("name", NAMES)
def test_a_full_size_model_gives_a_velocity_its_gradient_and_an_image(name: str) -> None:
    shorter = ["model.weights=random", "model.architecture.transformer.num_layers=2"]
    config = load_config("train", [f"model={name}", *shorter])
    # shapes and types without a single value
    with products() as found:
        model = build_partial(config.model, "adaptation")(adaptation=LoRA())
        x, conditions = torch.randn(2, *model.latent_shape), model.encode(["a red circle", " ".join(["two"] * 100)])
        found.dtypes.clear()
        v = combined(model.velocity(x, 0.7, conditions))
        v.float().sum().backward()
        images = model.decode(x)
    assert conditions.embeds_BLC.shape == (2, 256, 3584 if name == "qwen_image" else 4096)
    assert conditions.embeds_BLC[:1].shape == (1, 256, conditions.embeds_BLC.shape[2])
    assert v.shape == x.shape == ((2, 16, 64, 64) if name == "qwen_image" else (2, 64, 32, 32))
    # gradients of adapters are float32
    assert found.dtypes <= {torch.bfloat16, torch.float32}
    assert {weight.dtype for weight in model.transformer.parameters() if not weight.requires_grad} == {torch.bfloat16}
    assert images.shape == (2, 3, 512, 512)
    with products() as found, torch.no_grad():
        model = build_partial(config.model, "adaptation")(adaptation=LoRA())
        x, conditions = torch.randn(2, *model.latent_shape), model.encode(["a red circle", "two"])
        with model.sampling():
            # adapters have been merged in float32
            found.dtypes.clear()
            model.velocity(x, 0.7, conditions)
            model.decode(x)
    assert found.dtypes == {torch.bfloat16}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_activations_of_random_weights_neither_vanish_nor_blow_up(name: str, dtype: str) -> None:
    settings = [f"model.{key}={dtype}" for key in ("dtype", "decode_dtype")]
    wide = ["model.architecture.autoencoder.base_dim=32"]
    wide += ["model.architecture.autoencoder.decoder_base_dim=32"] if name == "qwen_image_21" else []
    config = load_config("train", [f"model={name}_miniature", "model.resolution=64", *settings, *wide])
    model = build_partial(config.model, "adaptation")(adaptation=LoRA())
    x = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    with model.sampling():
        v = combined(model.velocity(x, T, model.encode(["a red circle", "two blue squares"]))).float()
    assert 0.5 < v.std() < 2
    images = model.decode(x)
    assert images.shape == (2, 3, 64, 64)
    assert 0.05 < images.std() < 0.5


def full(family: Family, weights: Path, **settings: Any) -> Any:
    return family.make_model(weights, adaptation=FullFineTuning(), dtype="float64", **settings)


def whole(weight: Tensor) -> np.ndarray[Any, Any]:
    """As an array, since tensors of another process end with it."""
    return (weight.full_tensor() if isinstance(weight, DTensor) else weight).detach().numpy().copy()


def differentiated(world: World, name: str, weights: Path) -> tuple[Any, dict[str, Any]]:
    """Velocities of this rank's samples, and the gradient of all ranks'."""
    family = next(one for one in FAMILIES if one.name == name)
    model = full(family, weights, checkpointing=True)
    model.shard(world.group)
    rows, texts = Spread.evenly(5, world.size).rows[world.rank], [*PROMPTS[:3], TEXTS[1], TEXTS[0]]
    x = torch.randn(5, *family.latent, generator=torch.Generator().manual_seed(1), dtype=torch.float64)[list(rows)]
    conditions = model.encode(texts).take(rows)
    policy, reference = (_exact(v) for v in model.velocity_and_reference(x, T, conditions))
    ((policy - 1).square().sum() + (policy - reference).square().sum()).backward()
    model.sum_gradients(lambda gradients: world.sum_(gradients, "gradients"))
    with torch.no_grad(), model.gathered(), model.sampling():
        sampled = _exact(model.velocity(x, T, conditions))
    gradients = {name: whole(weight.grad) for name, weight in model.trainable.items() if weight.grad is not None}
    return whole(torch.stack([policy, sampled], dim=1)), gradients


def _exact(v: Any) -> Tensor:
    """In float64, which the kernels have no use for."""
    return v if isinstance(v, Tensor) else v.unconditional + v.scale * (v.conditional - v.unconditional)


def test_ranks_with_parts_of_the_weights_train_as_one_process_with_all(
    family: Family, weights: Path, on_ranks: Ranks
) -> None:
    velocities, gradients = differentiated(World(), family.name, weights)
    ranks = on_ranks(2, differentiated, family.name, weights)
    np.testing.assert_allclose(np.concatenate([rank[0] for rank in ranks]), velocities, atol=1e-10, rtol=0)
    for _, found in ranks:
        for key in found.keys() | gradients.keys():
            # what nobody reads has no gradient, or one of zero
            own, expected = found.get(key, 0.0), gradients.get(key, 0.0)
            np.testing.assert_allclose(own, expected, atol=1e-10, rtol=1e-8, err_msg=key)
    assert max(np.abs(gradient).max() for gradient in gradients.values()) > 1e-3


def test_fp8_is_near_and_covers_the_layers_of_blocks(family: Family, weights: Path) -> None:
    model = family.make_model(weights, lossy=Fp8())
    x, conditions = family.make_start(), model.encode(TEXTS)
    found = []
    for lossy in (False, True, False):
        with model.sampling(lossy=lossy):
            found.append(combined(model.velocity(x, T, conditions)))
    exact, near, again = found
    assert 1e-3 < (near - exact).norm() / exact.norm() < 0.2
    assert torch.equal(exact, again)


def test_texts_that_are_too_long_are_refused(family: Family, weights: Path) -> None:
    model = family.make_model(weights, max_sequence_length=70)
    num_tokens = {"qwen_image": 75, "qwen_image_21": 78}[family.name]
    message = (
        rf"^prompt 'two blue squares .*\.\.\.' is {num_tokens} tokens long with its chat template, and model\.max_"
    )
    with pytest.raises(ValueError, match=message):
        model.encode([TEXTS[1]])
    assert model.encode(TEXTS[:1]).lengths_B.tolist() == [num_tokens - 67]
    exact = family.make_model(weights, max_sequence_length=num_tokens)
    assert exact.encode([TEXTS[1]]).embeds_BLC.shape[1] == num_tokens


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_sequence_length": 0}, r"^model\.max_sequence_length must lie in 1 to 1024, .* got 0$"),
        ({"max_sequence_length": 1025}, r"^model\.max_sequence_length must lie in 1 to 1024"),
        ({"use_t5": False}, r"^model\.use_t5=false, but QwenImage(21)? has no T5; leave it out$"),
        (
            {"resolution": 1 << 20},
            r"^model\.resolution=1048576: .* must be at most (98304|32768); this model has no more po",
        ),
    ],
)
def test_settings_that_do_not_go_with_it_are_refused(
    settings: dict[str, Any], message: str, family: Family, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(family.model, "_make_pipeline", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=message):
        family.make_model(weights, **settings)


def test_resolutions_are_multiples_of_what_the_pipeline_rounds_to(family: Family, weights: Path) -> None:
    step = 2 * family.load(weights).vae_scale_factor
    assert step == {"qwen_image": 16, "qwen_image_21": 32}[family.name]
    for resolution in (step + 8, step // 2):
        with pytest.raises(ValueError, match=rf"^model\.resolution={resolution}: .* multiples of {step}[;,]"):
            family.make_model(weights, resolution=resolution)


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    of_21 = QWEN_IMAGE_21.make_pipeline(tmp_path / "21")
    with pytest.raises(
        ValueError, match=r"is of a QwenImage21Pipeline, not of a QwenImagePipeline; take model=qwen_image_21$"
    ):
        QWEN_IMAGE.make_model(of_21)
    of_1 = QWEN_IMAGE.make_pipeline(tmp_path / "1")
    with pytest.raises(
        ValueError, match=r"is of a QwenImagePipeline, not of a QwenImage21Pipeline; take model=qwen_image$"
    ):
        QWEN_IMAGE_21.make_model(of_1)
    config = of_1 / "transformer" / "config.json"
    config.write_text(config.read_text().replace('"zero_cond_t": false', '"zero_cond_t": true'))
    with pytest.raises(
        ValueError,
        match=r"^this transformer has zero_cond_t, which .* have not; give the weights of one, as Qwen/Qwen-Image$",
    ):
        QWEN_IMAGE.make_model(of_1)


def test_the_largest_image_has_positions_for_its_longest_text(family: Family, weights: Path) -> None:
    model = family.make_model(weights)
    transformer = model.transformer
    _, most = model.tokens_of(transformer.config)
    if family.name == "qwen_image":
        image, text = transformer.pos_embed([(1, most, 1)], max_txt_seq_len=1024, device=torch.device("cpu"))
        assert (len(image), len(text)) == (most, 1024)
        image, text = transformer.pos_embed([(1, most + 2, 1)], max_txt_seq_len=1024, device=torch.device("cpu"))
        assert len(text) < 1024
    else:
        # rows are latent pixels, two for each of ``most``; positions before the middle are at the end of the table
        assert [len(table) for table in transformer.pos_embed.freqs] == [8192 + most] * 3


def test_a_damaged_processor_is_refused(tmp_path: Path) -> None:
    weights = QWEN_IMAGE_21.make_pipeline(tmp_path / "21")
    (weights / "processor" / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"^model\.weights: .*processor lacks words or a chat template; download it a"):
        QWEN_IMAGE_21.make_model(weights)
    for path in (weights / "processor").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"^model\.weights: .*processor (cannot be read|lacks words)"):
        QWEN_IMAGE_21.make_model(weights)


def test_conditions_on_disk_are_of_one_processor(tmp_path: Path) -> None:
    weights = QWEN_IMAGE_21.make_pipeline(tmp_path / "21")
    before, again = (QWEN_IMAGE_21.make_model(weights).conditions.encoders for _ in range(2))
    (weights / "processor" / "tokenizer.json").open("a").write(" ")
    assert before == again != QWEN_IMAGE_21.make_model(weights).conditions.encoders


def test_turbo_samples_the_times_that_it_was_distilled_to() -> None:
    config = load_config("train", ["algorithm=flow_grpo", "model=qwen_image_21_turbo"])
    grid = build(config.algorithm).grid
    assert grid == (1.0, 0.978453, 0.95418, 0.926626, 0.89508, 0.845148, 0.704534, 0.414568, 0.0)
    assert config.model.guidance_scale == 1
