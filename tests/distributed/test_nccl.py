"""Ranks on GPUs, joined by NCCL: what tests of this folder find of gloo and CPUs holds there too.

    pytest -m gpu tests/distributed

One GPU is enough for a world of one rank, which shards its weights and sums its gradients through NCCL all the same.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.same_recipe import largest_difference
from fastgrpo.distributed.spread import Spread
from fastgrpo.distributed.world import World
from tests.distributed.test_same_recipe import SEARCH, make_trainer, rows_of
from tests.ranks import on_ranks

pytestmark = pytest.mark.gpu

# a reward that follows rounding, where the bytes of a JPEG would jump
SETTINGS = ("model.dtype=float32", "reward=custom", "reward.path=tests.distributed.test_nccl.contrast")
RECIPES = {
    "adapters": SEARCH,
    "gathered": ("adaptation=full", "train.learning_rate=1e-4"),
    "sharded": ("adaptation=full", "train.learning_rate=1e-4", "adaptation.rollout_weights=sharded"),
    "nodes": ("adaptation=full", "train.learning_rate=1e-4", "adaptation.shard_over=node"),
}


def contrast(images_BCHW: Tensor, prompts: list[str]) -> Tensor:
    return images_BCHW.std(dim=(1, 2, 3))


def needs(num_gpus: int) -> None:
    if torch.cuda.device_count() < num_gpus:
        pytest.skip(f"needs {num_gpus} GPUs, and torch sees {torch.cuda.device_count()}")


def exchange(world: World) -> tuple[str, list[float], list[float], int]:
    """A gather of uneven rows and a sum, through ``group``, and objects, through ``control``."""
    rows = torch.tensor(Spread.evenly(5, world.size).rows[world.rank], dtype=torch.float32, device=world.device)
    gathered = world.gather(lambda: rows[:, None] ** 2, Spread.evenly(5, world.size), 1, "squares")
    own = torch.full((3,), 1.0 + world.rank, device=world.device)
    world.sum_([own], "gradients")
    return str(world.device), gathered.flatten().tolist(), own.tolist(), sum(world.everyones(1, "counts"))


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_ranks_tell_each_other_numbers_and_objects(num_ranks: int) -> None:
    needs(num_ranks)
    for rank, found in enumerate(on_ranks(num_ranks, exchange, device="cuda")):
        total = float(num_ranks * (num_ranks + 1) // 2)
        assert found == (f"cuda:{rank}", [0.0, 1.0, 4.0, 9.0, 16.0], [total] * 3, num_ranks)


def train(world: World, weights: Path, output: Path, overrides: tuple[str, ...]) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    trainer = make_trainer(world, weights, output, *overrides)
    trainer.resume()
    trainer.run()


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_is_that_of_one_process(recipe: str, num_ranks: int, tiny_weights: Path, tmp_path: Path) -> None:
    needs(num_ranks)
    overrides = ("runtime.device=cuda", *SETTINGS, *RECIPES[recipe])
    train(World(device=torch.device("cuda")), tiny_weights, tmp_path / "alone", overrides)
    on_ranks(num_ranks, train, tiny_weights, tmp_path / "ranks", overrides, device="cuda", seconds=600)
    key, difference = largest_difference(rows_of(tmp_path / "alone"), rows_of(tmp_path / "ranks"))
    assert difference < 1e-3, key
