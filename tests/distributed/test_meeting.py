"""Ranks that torchrun started again meet each other, not what former attempts left in its store."""

import multiprocessing
import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fastgrpo.distributed.meeting import meet
from fastgrpo.distributed.world import join_world
from fastgrpo.training import train
from tests.tiny_config import make_config


def attempt(rank: int, port: int, num_that_die: int, results: multiprocessing.Queue) -> None:
    # as an agent that holds the store does
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    if rank < num_that_die:
        os._exit(1)
    world = join_world("cpu", timeout_seconds=1.0 if num_that_die else 60.0)
    own = torch.tensor([2.0**rank])
    world.sum_([own], "test")
    results.put((rank, own.item()))
    world.barrier("the end of the test")


def run_attempt(port: int, num_that_die: int) -> list[tuple[int, float]]:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [context.Process(target=attempt, args=(rank, port, num_that_die, results)) for rank in range(3)]
    for process in ranks:
        process.start()
    found = [] if num_that_die else sorted(results.get(timeout=60) for _ in ranks)
    for process in ranks:
        process.join(60)
    return found


def test_each_attempt_meets_anew_in_the_same_store() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    sums = [(rank, 7.0) for rank in range(3)]
    assert run_attempt(store.port, 0) == sums
    # one whose first rank never comes, though the others ask for it
    run_attempt(store.port, 1)
    assert run_attempt(store.port, 0) == sums
    assert run_attempt(store.port, 0) == sums


def be_first_of(num_ranks: int, store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"RANK": "0", "WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def test_ranks_that_do_not_come_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    # asked for by a former attempt only
    store.set("fastgrpo/asks/1", "former")
    be_first_of(3, store, monkeypatch)
    with pytest.raises(TimeoutError, match=r"ranks \[1, 2\] of 3 did not come in 0.3 s"):
        meet(timedelta(seconds=0.3))


def test_a_run_waits_for_its_ranks_as_long_as_its_config_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    be_first_of(2, store, monkeypatch)
    config = make_config(tmp_path / "weights", tmp_path / "run", "distributed.timeout_seconds=1")
    with pytest.raises(TimeoutError, match=r"ranks \[1\] of 2 did not come in 1 s"):
        train(config)
