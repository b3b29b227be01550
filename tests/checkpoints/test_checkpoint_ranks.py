"""Checkpoints of several ranks: each writes its part, any number of ranks reads them, and all fail together."""

import errno
import itertools
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from fastgrpo.checkpoints import shards
from fastgrpo.checkpoints.checkpoint import Checkpoint, CheckpointError, TrainState
from fastgrpo.distributed.world import World, join_world
from tests.ranks import Ranks, free_port, ranks_of_module

# as many rows as 4 ranks have: fewer, equal, more that do not divide; and what is never sharded
SHAPES = {"few": (3, 5), "equal": (4, 2, 2), "odd": (11, 3), "vector": (9,), "one": (1, 7)}


def write_small_parts() -> None:
    """However small the tensors are, every rank writes."""
    shards.PART_BYTES = 1


on_ranks = ranks_of_module(prepare=write_small_parts)


@pytest.fixture(autouse=True)
def every_rank_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "PART_BYTES", 1)


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
        old={name: weight * 0.25 for name, weight in weights.items()},
        optimizer={"state": state, "param_groups": groups},
        model="tiny",
        extra={"ema_updates": 3},
    )


def fresh_state(weights: dict[str, Tensor]) -> TrainState:
    """That of a run just begun: shapes and places are those of ``weights``, values are not, and AdamW has no state."""
    zeros = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    return TrainState(iteration=0, seconds=0, weights=zeros, ema=zeros, old=zeros, optimizer={}, model="tiny", extra={})


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


@pytest.mark.parametrize(
    ("placement", "dtype"), [("plain", torch.float32), ("sharded", torch.float64), ("hybrid", torch.bfloat16)], ids=str
)
def test_what_4_ranks_saved_1_2_and_4_ranks_load_bit_for_bit(
    tmp_path: Path, placement: str, dtype: torch.dtype, on_ranks: Ranks
) -> None:
    assert on_ranks(4, save, tmp_path, placement, dtype) == ["step_000001"] * 4
    expected = content(make_state(whole(dtype)))
    assert load(World(), tmp_path, "plain", dtype) == expected
    for num_ranks, other in ((2, "plain"), (2, "sharded"), (4, "sharded"), (4, "hybrid")):
        assert on_ranks(num_ranks, load, tmp_path, other, dtype) == [expected] * num_ranks


@pytest.mark.parametrize("placement", ["plain", "sharded"])
def test_what_1_and_2_ranks_saved_4_ranks_load_bit_for_bit(tmp_path: Path, placement: str, on_ranks: Ranks) -> None:
    expected = content(make_state(whole()))
    save(World(), tmp_path / "by_1", "plain", torch.float32)
    on_ranks(2, save, tmp_path / "by_2", placement, torch.float32)
    for directory in ("by_1", "by_2"):
        assert on_ranks(4, load, tmp_path / directory, placement, torch.float32) == [expected] * 4


def test_a_small_state_is_written_by_the_first_rank_and_a_large_one_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = whole()
    monkeypatch.setattr(shards, "PART_BYTES", 1 << 20)
    small = [shards.own_shards(tensors, rank, 4).keys() for rank in range(4)]
    assert [len(names) for names in small] == [len(tensors), 0, 0, 0]
    monkeypatch.setattr(shards, "PART_BYTES", 32)
    large = [shards.own_shards(tensors, rank, 4) for rank in range(4)]
    assert sorted(name for part in large for name in part) == sorted(tensors)
    # 15, 16, 33, 9 and 7 numbers in this order, each to the rank that has least
    assert [sum(shard.tensor.numel() for shard in part.values()) for part in large] == [15, 16, 33, 16]


@pytest.mark.parametrize("placement", ["plain", "sharded", "hybrid"])
def test_every_element_is_written_once_and_all_ranks_write(tmp_path: Path, placement: str, on_ranks: Ranks) -> None:
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
    assert len(num_elements) == (1 + 1 + 1 + 3) * len(SHAPES)
    assert len(writers) == 4


@contextmanager
def failing(how: str) -> Iterator[None]:
    """Inside, this process can write nothing durable, or no more than 100 bytes to a file."""
    if how == "fsync":
        with mock.patch.object(os, "fsync", side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))):
            yield
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save_with_a_full_disk(world: World, directory: Path, full_rank: int, how: str) -> tuple[str, list[str]]:
    checkpoint = Checkpoint(directory, every=1, keep=2, world=world, asynchronous=True)
    checkpoint.save(make_state(whole()))
    checkpoint.wait()
    with failing(how) if world.rank == full_rank else nullcontext():
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


@pytest.mark.parametrize(
    ("full_rank", "how", "reason"),
    [(0, "fsync", "No space left on device"), (2, "fsync", "No space left on device"), (1, "size", "File too large")],
)
def test_a_disk_that_is_full_on_one_rank_fails_the_save_on_all(
    tmp_path: Path, full_rank: int, how: str, reason: str, on_ranks: Ranks
) -> None:
    for message, left in on_ranks(3, save_with_a_full_disk, tmp_path, full_rank, how):
        assert message.startswith(f"cannot write checkpoint {tmp_path}/step_000002 (rank {full_rank}")
        assert reason in message
        assert "free space on that disk" in message
        assert left == ["step_000001"]


def read_damaged(world: World, directory: Path) -> tuple[str, str | None]:
    checkpoint = Checkpoint(directory, every=1, keep=2, world=world)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(directory / "step_000002")
    latest = checkpoint.latest()
    return str(caught.value), latest.name if latest else None


def save_two(world: World, directory: Path) -> None:
    checkpoint = Checkpoint(directory, every=1, keep=2, world=world)
    for iteration in (1, 2):
        checkpoint.save(make_state(whole(), iteration))


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_damage_to_one_ranks_file_is_found_by_all(tmp_path: Path, num_ranks: int, on_ranks: Ranks) -> None:
    on_ranks(4, save_two, tmp_path)
    files = sorted((tmp_path / "step_000002").glob("*_of_rank_*"))
    assert len(files) >= 4
    for file in files[:4]:
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        found = [read_damaged(World(), tmp_path)] if num_ranks == 1 else on_ranks(num_ranks, read_damaged, tmp_path)
        for message, latest in found:
            assert f"{file} is damaged" in message
            assert "resume from another checkpoint, or delete this one" in message
            assert latest == "step_000001"
        file.write_bytes(content)


def make_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 5), nn.Linear(5, 3)).double()


def train_and_save(
    world: World, directory: Path, first: int, last: int, sharding: tuple[int, ...]
) -> dict[str, Any] | None:
    """AdamW steps first to last of a network that FSDP2 shards, going on from the checkpoint of ``first``."""
    network = make_network()
    if sharding:
        mesh = init_device_mesh("cpu", sharding, mesh_dim_names=("repeat", "shard")[-len(sharding) :])
        for layer in network:
            fully_shard(layer, mesh=mesh)
        fully_shard(network, mesh=mesh)
    weights = dict(network.named_parameters())
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-2, weight_decay=0.1)
    checkpoint = Checkpoint(directory, every=1, keep=9, world=world, asynchronous=True)

    def state(iteration: int) -> TrainState:
        values = {name: weight.detach() for name, weight in weights.items()}
        return TrainState(
            iteration=iteration,
            seconds=0,
            weights=values,
            ema=values,
            old={},
            optimizer=optimizer.state_dict(),
            model="network",
            extra={},
        )

    if first:
        loaded = checkpoint.load_matching(directory / f"step_{first:06d}", state(0))
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(loaded.weights[name])
        optimizer.load_state_dict(loaded.optimizer)
    for step in range(first, last):
        # all ranks learn from the same rows, so that the mean of their gradients is that of one
        rows = torch.randn(4, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        network(rows).square().sum().backward()
        optimizer.step()
    checkpoint.save(state(last))
    checkpoint.wait()
    final = content(state(last))
    return final if world.is_first else None


def test_adamw_under_fsdp_goes_on_on_other_numbers_of_ranks_as_an_unsharded_run(
    tmp_path: Path, on_ranks: Ranks
) -> None:
    expected = train_and_save(World(), tmp_path / "alone", 0, 5, ())
    assert expected is not None
    on_ranks(4, train_and_save, tmp_path / "run", 0, 2, (4,))
    on_ranks(2, train_and_save, tmp_path / "run", 2, 3, (2,))
    train_and_save(World(), tmp_path / "run", 3, 4, ())
    final = on_ranks(4, train_and_save, tmp_path / "run", 4, 5, (2, 2))[0]
    for kind in ("weights", "optimizer"):
        assert numbers(final[kind]) == pytest.approx(numbers(expected[kind]), rel=1e-12, abs=1e-15)


def numbers(value: Any) -> list[float]:
    """All in it, in order."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [number for item in value for number in numbers(item)]
    return [float(value)] if isinstance(value, int | float) else []


def save_by_some(world: World, directory: Path) -> str | None:
    """Ranks 0 and 2 train, rank 1 does something else."""
    members = [0, 2]
    control: Any = dist.new_group(members, backend="gloo")
    if world.rank not in members:
        return None
    world = World(rank=members.index(world.rank), size=2, group=control, control=control)
    return save(world, directory, "plain", torch.float32)


def test_ranks_that_do_not_train_are_not_asked(tmp_path: Path, on_ranks: Ranks) -> None:
    assert on_ranks(3, save_by_some, tmp_path) == ["step_000001", None, "step_000001"]
    assert load(World(), tmp_path, "plain", torch.float32) == content(make_state(whole()))


def save_until_killed(rank: int, directory: Path, port: int, killed_rank: int, last_step: int) -> None:
    """Checkpoints 1, 2, ... by 3 ranks, one of which dies before the ``last_step``th thing it asks of the disk."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    world = join_world("cpu", timeout_seconds=60)
    checkpoint = Checkpoint(directory, every=1, keep=1, world=world, asynchronous=True)
    steps = itertools.count(1)

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **settings: Any) -> Any:
            if rank == killed_rank and next(steps) == last_step:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **settings)

        return run

    try:
        checkpoint.save(make_state(whole(seed=1), iteration=1))
        checkpoint.wait()
        for name in ("fsync", "mkdir", "rename", "rmdir"):
            setattr(os, name, counted(getattr(os, name)))
        checkpoint.save(make_state(whole(seed=2), iteration=2))
        checkpoint.save(make_state(whole(seed=3), iteration=3))
        checkpoint.wait()
    except CheckpointError:
        os._exit(11)
    os._exit(0)


# what rank 0 asks of the disk for one checkpoint: to make its directory, 4 files and their directory durable, the
# manifest and its directory, the rename and the directory above, and to rename and remove the old one; rank 2: its
# files and their directory, then those of the next checkpoint
@pytest.mark.parametrize(("killed_rank", "last_step"), [*((0, step) for step in range(1, 13)), (2, 1), (2, 4), (2, 5)])
def test_a_rank_killed_at_any_step_leaves_a_whole_checkpoint_and_the_others_fail_soon(
    tmp_path: Path, killed_rank: int, last_step: int
) -> None:
    port = free_port()
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=save_until_killed, args=(rank, tmp_path, port, killed_rank, last_step))
        for rank in range(3)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [
        -signal.SIGKILL if rank == killed_rank else 11 for rank in range(3)
    ]
    checkpoint = Checkpoint(tmp_path, every=1, keep=1)
    latest = checkpoint.latest()
    assert latest is not None
    state = checkpoint.load(latest)
    assert content(state) == content(make_state(whole(seed=state.iteration), iteration=state.iteration))
    # and a run of another number of ranks goes on in that directory
    checkpoint.save(make_state(whole(), iteration=4))
    assert [path.name for path in tmp_path.iterdir()] == ["step_000004"]
