"""Checkpoints of several ranks: each writes its part, any number of ranks reads them, and all fail together."""

import errno
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from fastgrpo.checkpoint import Checkpoint, CheckpointError, TrainState
from fastgrpo.runtime import shards
from fastgrpo.runtime.distributed import World
from tests.ranks import on_ranks

# as many rows as 4 ranks have: fewer, equal, more that do not divide; and what is never sharded
SHAPES = {"few": (3, 5), "equal": (4, 2, 2), "odd": (11, 3), "vector": (9,), "one": (1, 7)}


def whole(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def make_state(weights: dict[str, Tensor], iteration: int = 1) -> TrainState:
    """Averages and moments are functions of the weights; the optimizer also has plain tensors and numbers."""
    state = {
        i: {"step": torch.tensor(float(i + 1)), "exp_avg": weight * 3, "exp_avg_sq": weight * weight}
        for i, weight in enumerate(weights.values())
    }
    groups = [{"lr": 0.1, "betas": (0.9, 0.99), "params": list(range(len(weights)))}]
    return TrainState(
        iteration=iteration,
        seconds=1.5,
        weights=weights,
        ema={name: weight * 0.5 for name, weight in weights.items()},
        optimizer={"state": state, "param_groups": groups},
        model="tiny",
        extra={"ema_updates": 3},
    )


def fresh_state(weights: dict[str, Tensor]) -> TrainState:
    """That of a run just begun: shapes and places are those of ``weights``, values are not, and AdamW has no state."""
    zeros = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    return TrainState(iteration=0, seconds=0, weights=zeros, ema=zeros, optimizer={}, model="tiny", extra={})


def placed(tensors: dict[str, Tensor], world: World, placement: str) -> dict[str, Tensor]:
    """Plain, sharded over all ranks, or sharded in pairs of ranks that repeat each other."""
    if placement == "plain":
        return tensors
    places: list[Placement] = [Shard(0)]
    sizes: tuple[int, ...] = (world.size,)
    if placement == "hybrid":
        sizes, places = (2, world.size // 2), [Replicate(), Shard(0)]
    mesh = init_device_mesh("cpu", sizes)
    return {name: distribute_tensor(tensor, mesh, places) for name, tensor in tensors.items()}


def as_lists(value: Any) -> Any:
    """Whole tensors as numbers, the bits of which JSON-like lists keep."""
    if isinstance(value, DTensor):
        value = value.full_tensor()
    if isinstance(value, Tensor):
        return [str(value.dtype), list(value.shape), value.double().flatten().tolist()]
    if isinstance(value, dict):
        return {key: as_lists(item) for key, item in value.items()}
    return [as_lists(item) for item in value] if isinstance(value, list) else value


def content(state: TrainState) -> dict[str, Any]:
    return as_lists(dict(vars(state)))


def save(world: World, directory: Path, placement: str, dtype: torch.dtype) -> str:
    shards.PART_BYTES = 1
    weights = placed(whole(dtype), world, placement)
    checkpoint = Checkpoint(directory, every=1, keep=2, world=world, asynchronous=True)
    path = checkpoint.save(make_state(weights))
    with torch.no_grad():
        # what training does next is not in the checkpoint
        for weight in weights.values():
            weight.mul_(-1)
    world.sum_([torch.ones(3)], "gradients, while the checkpoint is written")
    checkpoint.wait()
    return path.name


def load(world: World, directory: Path, placement: str, dtype: torch.dtype) -> dict[str, Any]:
    weights = placed(whole(dtype, seed=1), world, placement)
    checkpoint = Checkpoint(directory, every=1, keep=2, world=world)
    latest = checkpoint.latest()
    assert latest is not None
    state = checkpoint.load_matching(latest, fresh_state(weights))
    tensors = [*state.weights.values(), *state.ema.values()]
    tensors += [value for of in state.optimizer["state"].values() for name, value in of.items() if name != "step"]
    for tensor, weight in zip(tensors, [*weights.values()] * 2, strict=False):
        if isinstance(weight, DTensor):
            assert isinstance(tensor, DTensor)
            assert tensor.placements == weight.placements
    assert all(isinstance(tensor, DTensor) == (placement != "plain") for tensor in tensors)
    return content(state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("placement", ["plain", "sharded", "hybrid"])
def test_what_4_ranks_saved_1_2_and_4_ranks_load_bit_for_bit(
    tmp_path: Path, placement: str, dtype: torch.dtype
) -> None:
    assert on_ranks(4, save, tmp_path, placement, dtype) == ["step_000001"] * 4
    expected = content(make_state(whole(dtype)))
    assert load(World(), tmp_path, "plain", dtype) == expected
    for num_ranks, other in ((2, "plain"), (2, "sharded"), (4, "sharded"), (4, "hybrid")):
        assert on_ranks(num_ranks, load, tmp_path, other, dtype) == [expected] * num_ranks


@pytest.mark.parametrize("placement", ["plain", "sharded"])
def test_what_1_and_2_ranks_saved_4_ranks_load_bit_for_bit(tmp_path: Path, placement: str) -> None:
    expected = content(make_state(whole()))
    save(World(), tmp_path / "by_1", "plain", torch.float32)
    on_ranks(2, save, tmp_path / "by_2", placement, torch.float32)
    for directory in ("by_1", "by_2"):
        assert on_ranks(4, load, tmp_path / directory, placement, torch.float32) == [expected] * 4


@pytest.mark.parametrize(("placement", "num_writers"), [("plain", 4), ("sharded", 4), ("hybrid", 4)])
def test_every_element_is_written_once_and_all_ranks_write(tmp_path: Path, placement: str, num_writers: int) -> None:
    on_ranks(4, save, tmp_path, placement, torch.float32)
    num_elements: dict[str, int] = {}
    writers = set()
    for file in (tmp_path / "step_000001").glob("*.safetensors"):
        writers.add(file.stem.split("_")[-1])
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                num_elements[name] = num_elements.get(name, 0) + opened.get_tensor(name).numel()
    weights = {f"weights/{name}": tensor.numel() for name, tensor in whole().items()}
    assert {name: number for name, number in num_elements.items() if name.startswith("weights/")} == weights
    assert len(num_elements) == (1 + 1 + 3) * len(SHAPES)
    assert len(writers) == num_writers


def save_with_a_full_disk(world: World, directory: Path, full_rank: int) -> tuple[str, list[str]]:
    shards.PART_BYTES = 1
    checkpoint = Checkpoint(directory, every=1, keep=2, world=world, asynchronous=True)
    checkpoint.save(make_state(whole()))
    checkpoint.wait()
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with mock.patch.object(os, "fsync", side_effect=full if world.rank == full_rank else None):
        checkpoint.save(make_state(whole(), iteration=2))
        with pytest.raises(CheckpointError) as caught:
            checkpoint.wait()
    world.barrier("the failed save")
    left = sorted(path.name for path in directory.iterdir())
    world.barrier("a look at what is left")
    # and it can be tried again
    checkpoint.save(make_state(whole(), iteration=3))
    assert checkpoint.latest() == directory / "step_000003"
    return str(caught.value), left


@pytest.mark.parametrize("full_rank", [0, 2])
def test_a_disk_that_is_full_on_one_rank_fails_the_save_on_all(tmp_path: Path, full_rank: int) -> None:
    for message, left in on_ranks(3, save_with_a_full_disk, tmp_path, full_rank):
        assert message.startswith(f"cannot write checkpoint {tmp_path}/step_000002 (rank {full_rank}")
        assert "No space left on device" in message
        assert "free space on that disk" in message
        assert left == ["step_000001"]
