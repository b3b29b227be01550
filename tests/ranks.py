"""Run a function on several ranks, in processes forked from the test: a rank starts in milliseconds.

On GPUs, whose driver does not outlive a fork, they are started anew.
"""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from fastgrpo.distributed.world import World, join_world, leave_world

_SECONDS = 120.0


def on_ranks(
    num_ranks: int, run: Callable[..., Any], *args: Any, seconds: float = _SECONDS, device: str = "cpu"
) -> list[Any]:
    """What ``run(world, *args)`` returns on each rank; what one of them raises fails the test.

    The world is joined by gloo, or by NCCL if ``device`` is cuda.  Results travel as pickles: return numbers, lists and
    small tensors.
    """
    context: Any = multiprocessing.get_context("fork" if device == "cpu" else "spawn")
    port = _free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(num_ranks)]
    ranks = [
        context.Process(target=_main, args=(rank, num_ranks, port, device, pipes[rank][1], run, args), daemon=True)
        for rank in range(num_ranks)
    ]
    for rank in ranks:
        rank.start()
    try:
        results = [_receive(rank, pipes[rank][0], seconds) for rank in range(num_ranks)]
    finally:
        for process in ranks:
            process.kill()
            process.join()
    return results


def _receive(rank: int, pipe: Connection, seconds: float) -> Any:
    if not pipe.poll(seconds):
        raise TimeoutError(f"rank {rank} did not answer in {seconds:g} s")
    is_result, value = pipe.recv()
    if not is_result:
        raise AssertionError(f"rank {rank} raised\n{value}")
    return value


def _main(
    rank: int, num_ranks: int, port: int, device: str, pipe: Connection, run: Callable[..., Any], args: Any
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    try:
        world: World = join_world(device, timeout_seconds=60)
        pipe.send((True, run(world, *args)))
        # a rank that leaves first would break the others' last exchange
        world.barrier("the end of the test")
        leave_world()
    except BaseException:
        pipe.send((False, traceback.format_exc()))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
