"""Ranks on GPUs, joined by NCCL: what tests of this folder find of gloo and CPUs holds there too.

    pytest -m gpu tests/distributed

One GPU is enough for a world of one rank, which shards its weights and sums its gradients through NCCL all the same.
"""

from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from benchmarks.rounding import Run, beyond_rounding, differences
from fastgrpo.distributed.spread import Spread
from fastgrpo.distributed.world import World
from tests.distributed.test_same_recipe import SEARCH
from tests.distributed.training import make_config, train
from tests.ranks import Ranks, ranks_of_module

pytestmark = pytest.mark.gpu

RECIPES = {
    "adapters": SEARCH,
    "gathered": ("adaptation=full", "train.learning_rate=1e-4"),
    "sharded": ("adaptation=full", "train.learning_rate=1e-4", "adaptation.rollout_weights=sharded"),
    "nodes": ("adaptation=full", "train.learning_rate=1e-4", "adaptation.shard_over=node"),
}

on_ranks = ranks_of_module()


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
def test_ranks_tell_each_other_numbers_and_objects(num_ranks: int, on_ranks: Ranks) -> None:
    needs(num_ranks)
    for rank, found in enumerate(on_ranks(num_ranks, exchange, device="cuda")):
        total = float(num_ranks * (num_ranks + 1) // 2)
        assert found == (f"cuda:{rank}", [0.0, 1.0, 4.0, 9.0, 16.0], [total] * 3, num_ranks)


def train_in_float32(world: World, config: DictConfig, output: Path) -> Run:
    # in a process of the rank's own, which the test's fixture does not reach
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return train(world, config, output)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_is_that_of_one_process(
    recipe: str, num_ranks: int, tiny_weights: Path, tmp_path: Path, on_ranks: Ranks, float32_is_exact: None
) -> None:
    needs(num_ranks)
    config = make_config(tiny_weights, "runtime.device=cuda", "model.dtype=float32", *RECIPES[recipe])
    alone = train(World(device=torch.device("cuda")), config, tmp_path / "alone")
    found = on_ranks(num_ranks, train_in_float32, config, tmp_path / "ranks", device="cuda", seconds=600)
    assert beyond_rounding(differences(alone, found[0]), "float32") == {}
