"""Prompts of several resolutions: an iteration is of one, and a run of them is as exact as a run of one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastgrpo.algorithm.noise import EVALUATION_STREAM
from fastgrpo.assembly import build_trainer
from fastgrpo.cli import main
from fastgrpo.config import load_config
from fastgrpo.distributed.world import World
from fastgrpo.memory.batches import BatchSizes
from fastgrpo.parts import RunParts
from fastgrpo.records.grids import cell_origin
from fastgrpo.resolution import Resolution
from fastgrpo.sampler import Sampler
from fastgrpo.training import train as train_run
from fastgrpo.types import Prompts, Samples
from fastgrpo_kernels import philox_normal
from tests.checkpoints.test_resume import final_state, lasting_metrics
from tests.distributed.test_same_recipe import FULL, IMAGES, RARE_SEARCH, SEARCH, beyond
from tests.distributed.training import FLOAT64, make_config, make_trainer, train
from tests.ranks import Ranks, ranks_of_module
from tests.tiny_config import make_overrides

WIDE, TALL = Resolution(32, 64), Resolution(96, 32)
# model.resolution is 64, which the third row names
ROWS: list[dict[str, Any]] = [
    {"prompt": "a red circle", "resolution": [96, 32]},
    {"prompt": "two blue squares", "resolution": [32, 64]},
    {"prompt": "a green triangle", "resolution": [64, 64]},
    {"prompt": "a red square"},
    {"prompt": "two red triangles", "resolution": [32, 64]},
]
RESOLUTIONS = [TALL, WIDE, None, None, WIDE]
LATENT_SHAPES = {WIDE: (16, 4, 8), None: (16, 8, 8), TALL: (16, 12, 4)}

on_ranks = ranks_of_module()


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The words that take these prompts, for training and evaluation."""
    path = tmp_path_factory.mktemp("prompts") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return f"prompts.path={path}", f"prompts.held_out={path}"


@pytest.mark.parametrize("recipe", [(), SEARCH, IMAGES], ids=["steps", "search", "images"])
def test_an_iteration_is_of_one_shape_from_its_noise_to_its_images(
    recipe: tuple[str, ...], rows: tuple[str, ...], tiny_weights: Path, tmp_path: Path
) -> None:
    words = (*rows, *recipe, "reward.scoring.micro_batch=2", "reward.golden=false")
    trainer = build_trainer(load_config("train", make_overrides(tiny_weights, tmp_path / "run", *words)))
    found: list[tuple[int, ...]] = []
    rollout = trainer.rollout

    def keeping(samples: Samples, *arguments: Any, **settings: Any) -> Any:
        trajectories = rollout(samples, *arguments, **settings)
        resolution = samples.prompts.resolution
        found.append(tuple(trajectories.start_BCHW.shape[1:]))
        assert found[-1] == LATENT_SHAPES[resolution]
        assert tuple(trajectories.images_BCHW.shape[2:]) == (resolution or (64, 64))
        assert {RESOLUTIONS[[row["prompt"] for row in ROWS].index(text)] for text in samples.texts} == {resolution}
        return trajectories

    trainer.rollout = keeping  # type: ignore[assignment]
    for _ in range(5):
        metrics = trainer.step()
        assert metrics.get("ratio_deviation", 0.0) == 0.0
        assert metrics["skipped_steps"] == 0
        shapes: dict[tuple[int, ...], Any] = {shape: resolution for resolution, shape in LATENT_SHAPES.items()}
        assert (metrics.get("height"), metrics.get("width")) == (shapes[found[-1]] or (None, None))
    # 2, 2 and 1 of 5 prompts
    assert [found.count(LATENT_SHAPES[resolution]) for resolution in (WIDE, None, TALL)] == [2, 2, 1]


def test_a_killed_run_goes_on_to_the_bit(
    rows: tuple[str, ...], tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastgrpo.records.metrics.draw_curves", lambda rows, path, title: None)
    words = (*rows, *SEARCH, "evaluate.every=2", "checkpoint.every=1", "train.learning_rate=1e-2")

    def run(name: str, iterations: int, *more: str) -> Path:
        overrides = make_overrides(tiny_weights, tmp_path / name, *words, f"train.iterations={iterations}", *more)
        return train_run(load_config("train", overrides))

    undisturbed = run("undisturbed", 4)
    run("resumed", 1)
    resumed = run("resumed", 4, "resume=true")
    # the end at one iteration had an evaluation of its own, in which nothing is learned
    assert [row["loss"] for row in lasting_metrics(resumed)[2:]] == [
        row["loss"] for row in lasting_metrics(undisturbed)[2:]
    ]
    assert lasting_metrics(resumed)[2:] == lasting_metrics(undisturbed)[2:]
    assert final_state(resumed) == final_state(undisturbed)
    page = np.asarray(Image.open(resumed / "images/before_after.png"))
    # gray around what is smaller than 96 x 64
    assert (page == 226).all(axis=2).sum() > 1000


def evaluated(world: World, config: Any, output: Path) -> tuple[dict[str, Any], list[Any]]:
    """Scores, and the images on the first rank."""
    result = make_trainer(world, config, output).evaluation()
    return {name: score_PG.tolist() for name, score_PG in result.scores.items()}, [i.tolist() for i in result.images]


def test_evaluation_makes_each_image_in_its_resolution_from_the_noise_of_its_prompt(
    rows: tuple[str, ...], tiny_weights: Path, tmp_path: Path
) -> None:
    words = (*rows, "evaluate.images_per_prompt=2", "reward.golden=false", "reward.scoring.micro_batch=3")
    trainer = build_trainer(load_config("train", make_overrides(tiny_weights, tmp_path / "run", *words)))
    evaluation, model = trainer.evaluation, trainer.model
    result = evaluation()
    assert result.texts == [row["prompt"] for row in ROWS]
    assert result.num_images == 10
    sampler = Sampler(model=model, grid=evaluation.grid, batch_sizes=BatchSizes.of(1))

    def alone(row: int, place: int) -> Tensor:
        shape, text = LATENT_SHAPES[RESOLUTIONS[row]], ROWS[row]["prompt"]
        noise = philox_normal(0, EVALUATION_STREAM, torch.tensor([row]), torch.tensor([place]), int(np.prod(shape)))
        return sampler(Samples.all_of(Prompts([text], ids=[row]), 1), model.encode([text]), noise.view(1, *shape))

    for row, image_CHW in enumerate(result.images):
        torch.testing.assert_close(image_CHW, alone(row, 0)[0], atol=1e-5, rtol=0)
        assert tuple(image_CHW.shape[1:]) == (RESOLUTIONS[row] or (64, 64))
    named = trainer.rewards.all
    for row in range(len(ROWS)):
        for place in range(2):
            images_1CHW = alone(row, place)
            for name, reward in named.items():
                score = float(reward(images_1CHW, [ROWS[row]["prompt"]])[0])
                assert result.scores[name][row, place].item() == pytest.approx(score, abs=0.05)


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(SEARCH, id="search"),
        pytest.param(IMAGES, id="images"),
        # weights in parts: both ranks ask for as many velocities, of whatever shape
        pytest.param((*RARE_SEARCH, *FULL, "adaptation.rollout_weights=sharded"), id="shards"),
    ],
)
def test_ranks_train_and_evaluate_as_one(
    recipe: tuple[str, ...], rows: tuple[str, ...], tiny_weights: Path, tmp_path: Path, on_ranks: Ranks
) -> None:
    words = (*FLOAT64, *recipe, *rows, "train.iterations=4", "evaluate.every=2", "runtime.micro_batch=2")
    # of five images in one resolution a rank has three, in two batches, and the other as many batches for its two
    config = make_config(tiny_weights, *words, "evaluate.images_per_prompt=5")
    alone = train(World(), config, tmp_path / "1")
    assert beyond(alone, on_ranks(2, train, config, tmp_path / "ranks")) == {}


def test_ranks_show_the_images_of_one_rank(
    rows: tuple[str, ...], tiny_weights: Path, tmp_path: Path, on_ranks: Ranks
) -> None:
    config = make_config(tiny_weights, *FLOAT64, *rows, "evaluate.images_per_prompt=3")
    scores, images = evaluated(World(), config, tmp_path / "1")
    # three images of one of the resolutions: one rank makes an image that is thrown away
    found = on_ranks(2, evaluated, config, tmp_path / "ranks")
    for other_scores, _ in found:
        for name, score_PG in scores.items():
            torch.testing.assert_close(torch.tensor(other_scores[name]), torch.tensor(score_PG), atol=1e-6, rtol=0)
    assert found[1][1] == []
    for image, other in zip(images, found[0][1], strict=True):
        torch.testing.assert_close(torch.tensor(other), torch.tensor(image), atol=1e-6, rtol=0)


def test_samples_are_in_the_order_of_the_file_and_each_in_its_resolution(
    rows: tuple[str, ...], tiny_weights: Path, tmp_path: Path
) -> None:
    words = ["sample", f"model.weights={tiny_weights}", "runtime.device=cpu", "num_steps=1", "images_per_prompt=2"]
    assert main([*words, rows[0], f"output={tmp_path / 'out'}", "runtime.micro_batch=4"]) == 0
    files = sorted((tmp_path / "out").glob("0*.png"))
    assert [path.name.partition(".")[0] for path in files] == [
        f"000{row}_0{number}_{ROWS[row]['prompt'].replace(' ', '_')}" for row in range(5) for number in range(2)
    ]
    for path in files:
        height, width = RESOLUTIONS[int(path.name[:4])] or (64, 64)
        assert Image.open(path).size == (width, height)
    page = np.asarray(Image.open(tmp_path / "out/grid.png"))
    for index, path in enumerate(files):
        # 96 x 64 and all others twice as large
        pixels = np.asarray(Image.open(path)).repeat(2, axis=0).repeat(2, axis=1)
        (height, width, _), (x, y) = pixels.shape, cell_origin(index, 10, 1, 96, 64)
        top, left = y + (192 - height) // 2, x + (128 - width) // 2
        assert np.array_equal(page[top : top + height, left : left + width], pixels)


@pytest.mark.parametrize(
    ("resolution", "message"),
    [
        (
            [64, 96],
            "resolution [64, 96] has more pixels than model.resolution=64, which memory is planned for; raise "
            "model.resolution, or lower this one",
        ),
        ([40, 64], "resolution [40, 64]: height and width must be multiples of 16; 32 and 48 are the nearest to 40"),
        (
            [16, 144],
            "resolution [16, 144]: height and width must be at most 128; this model has no more positions",
        ),
        (0, "resolution 0: height and width must be multiples of 16; 16 is the nearest to 0"),
        ("wide", "resolution must be a whole number or [height, width], got 'wide'"),
    ],
    ids=str,
)
@pytest.mark.parametrize("key", ["path", "held_out"])
def test_a_row_that_cannot_be_drawn_is_refused_before_anything_is_made(
    key: str,
    resolution: Any,
    message: str,
    rows: tuple[str, ...],
    tiny_weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a red circle"}\n' + json.dumps({"prompt": "a", "resolution": resolution}) + "\n")
    monkeypatch.setattr(
        "fastgrpo.memory.model_on_device.ModelSource.__call__", lambda _: pytest.fail("a model is made")
    )
    monkeypatch.setattr("fastgrpo.rewards.source.RewardSource.load", lambda *_: pytest.fail("rewards are made"))
    overrides = make_overrides(tiny_weights, tmp_path / "run", *rows, f"prompts.{key}={path}")
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        train_run(load_config("train", overrides))
    assert str(raised.value) == f"prompts.{key}: {path}:2: {message}"


def test_resolutions_are_those_of_the_model_that_is_chosen(
    rows: tuple[str, ...], tiny_weights: Path, tmp_path: Path
) -> None:
    def read(*words: str) -> RunParts:
        return RunParts.read(load_config("train", make_overrides(tiny_weights, tmp_path / "run", *rows, *words)))

    assert [prompt.resolution for prompt in read().prompts] == RESOLUTIONS
    wide = read("model.resolution=[96,64]")
    assert [prompt.resolution for prompt in wide.held_out] == [TALL, WIDE, Resolution(64, 64), None, WIDE]
    assert [prompt.resolution for prompt in read("model.resolution=[64,64]").prompts] == RESOLUTIONS


class Silent:
    """Takes what every model takes, and does not say what it draws."""

    def __init__(
        self,
        *,
        adaptation: Any,
        device: Any,
        attention: Any,
        compile: Any,
        checkpointing: Any,
        lossy: Any,
        resolution: int,
    ) -> None: ...


def test_a_model_that_does_not_say_what_it_draws_takes_no_other_resolution(
    rows: tuple[str, ...], tiny_weights: Path, tmp_path: Path
) -> None:
    config = load_config("train", make_overrides(tiny_weights, tmp_path / "run", *rows))
    config.model = {"_target_": "tests.test_buckets.Silent", "resolution": 64}
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: tests\.test_buckets\.Silent has no image_sizes, so nobody"):
        RunParts.read(config)
