"""One rank of a measured run: a process that trains by the overrides it is given, and writes what it told."""

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.multiprocessing

from benchmarks.scaling.measured import Counts, Measured, run
from fastgrpo.assembly import build_trainer
from fastgrpo.config import load_config
from fastgrpo.distributed.traffic import Collective
from fastgrpo.distributed.world import join_world, leave_world
from fastgrpo.memory.device import device_of
from fastgrpo.parts import read_runtime
from fastgrpo.rewards.ranks import PolicyRank


def train_on_ranks(
    directory: Path, num_ranks: int, overrides: list[str], per_node: int | None = None
) -> list[Measured]:
    """What each rank of a run told.  Ranks are forked, so that libraries are imported once."""
    arguments = (num_ranks, per_node or num_ranks, _free_port(), directory, overrides)
    torch.multiprocessing.start_processes(_main, arguments, nprocs=num_ranks, start_method="fork")
    return [_read(directory / f"rank_{rank}.json") for rank in range(num_ranks)]


def _main(rank: int, num_ranks: int, per_node: int, port: int, directory: Path, overrides: list[str]) -> None:
    with (directory / f"log_{rank}.txt").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if num_ranks > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
        os.environ |= {"LOCAL_RANK": str(rank % per_node), "LOCAL_WORLD_SIZE": str(per_node)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    config = load_config("train", overrides)
    world = join_world(device_of(read_runtime(config)), config.distributed.timeout_seconds)
    measured = run(build_trainer(config, PolicyRank(world=world)))
    rows = {"iterations": [_rows(counts) for counts in measured.iterations], "between": _rows(measured.between)}
    (directory / f"rank_{rank}.json").write_text(json.dumps(rows))
    world.barrier("the end of the run")
    leave_world()


def _read(path: Path) -> Measured:
    """What a rank wrote."""
    rows = json.loads(path.read_text())
    return Measured([_counts(part) for part in rows["iterations"]], _counts(rows["between"]))


def _rows(counts: Mapping[Collective, int]) -> list[dict[str, Any]]:
    return [{**asdict(one), "calls": count} for one, count in counts.items()]


def _counts(rows: list[dict[str, Any]]) -> Counts:
    found = Counts()
    for row in rows:
        calls = row.pop("calls")
        found[Collective(**{**row, "shapes": tuple(tuple(shape) for shape in row["shapes"])})] += calls
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
