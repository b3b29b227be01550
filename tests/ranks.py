"""Run a function on several ranks, in processes that are started once a test module: a call takes milliseconds.

    on_ranks = ranks_of_module()

    def test_each_rank_has_its_number(on_ranks: Ranks) -> None:
        assert on_ranks(2, number_of, 10) == [10, 11]

calls ``number_of(world, 10)`` on two ranks.  Each number of ranks has processes of its own, which join their world once
and live on from call to call, until one of them fails: then the next call starts others.  They are forked from a
server that has imported all they need and run none of it, since autograd's threads do not outlive a fork, which a
PyTorch that is built for CUDA has; on GPUs, whose driver does not either, they are started anew.
"""

import itertools
import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fastgrpo.distributed.world import World, join_world, leave_world

_SECONDS = 120.0
# for the others to say what they know of a rank that failed
_GRACE_SECONDS = 1.0
# below those that the system gives to connections; where a process begins to look is its own, so that two rarely meet
_PORTS = range(10_000, 32_000)
_ports = itertools.count(os.getpid() * 137)


def ranks_of_module(*, joined: bool = True, prepare: Callable[[], None] | None = None) -> Any:
    """A fixture, ``Ranks`` that live as long as the tests of the module that it is assigned in.

    prepare: a function of a module, called in each process before anything else; what a test patches stays in its own.
    """

    @pytest.fixture(scope="module")
    def on_ranks() -> Iterator[Ranks]:
        ranks = Ranks(joined, prepare)
        yield ranks
        ranks.end()

    return on_ranks


class Ranks:
    """Worlds of several ranks, by their number.

    Ranks that are not ``joined`` know of each other from their environment alone; each is a world of one.
    """

    def __init__(self, joined: bool = True, prepare: Callable[[], None] | None = None) -> None:
        self._joined, self._prepare = joined, prepare
        self._teams: dict[tuple[int, str], _Team] = {}

    def __call__(
        self,
        num_ranks: int,
        run: Callable[..., Any],
        *args: Any,
        seconds: float = _SECONDS,
        device: str = "cpu",
        killed: Collection[int] = (),
        **settings: Any,
    ) -> list[Any]:
        """What ``run(world, *args, **settings)`` returns on each rank; what one of them raises fails the test.

        The world is joined by gloo, or by NCCL if ``device`` is cuda.  All travels as pickles: ``run`` is a function
        of a module.  Ranks that are to be ``killed`` return None.
        """
        key = num_ranks, device
        if key not in self._teams:
            self._teams[key] = _Team(num_ranks, device, self._joined, self._prepare)
        try:
            results = self._teams[key].call(run, args, settings, seconds, killed)
        except BaseException:
            self._teams.pop(key).end()
            raise
        if killed:
            self._teams.pop(key).end()
        return results

    def end(self) -> None:
        """Kill all of them."""
        while self._teams:
            self._teams.popitem()[1].end()


class _Team:
    """The processes of one world, and the store that they meet at, which is held here: nobody else takes its port."""

    def __init__(self, num_ranks: int, device: str, joined: bool, prepare: Callable[[], None] | None) -> None:
        context: Any = multiprocessing.get_context("forkserver" if device == "cpu" else "spawn")
        # heeded by the first that starts the server
        context.set_forkserver_preload(["tests.ranks", "fastgrpo.training"])
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(num_ranks):
            own, theirs = context.Pipe()
            environment = _environment(rank, num_ranks, self._store.port)
            settings = (environment, device, joined, prepare, theirs)
            process = context.Process(target=_serve, args=settings, daemon=True)
            process.start()
            # the last end of the pipe but that of the rank, so that its death is seen
            theirs.close()
            self._pipes.append(own)
            self._processes.append(process)

    def call(
        self, run: Callable[..., Any], args: Any, settings: Any, seconds: float, killed: Collection[int]
    ) -> list[Any]:
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((run, args, settings)))
        results: list[Any] = [None] * len(self._pipes)
        failures: list[str] = []
        silent, deadline = dict(enumerate(self._pipes)), time.monotonic() + seconds
        while silent and (ready := wait(list(silent.values()), max(0.0, deadline - time.monotonic()))):
            for rank in [rank for rank, pipe in silent.items() if pipe in ready]:
                try:
                    is_result, value = pickle.loads(silent.pop(rank).recv_bytes())
                except EOFError:
                    is_result, value = rank in killed, None if rank in killed else f"rank {rank} died"
                if is_result:
                    results[rank] = value
                else:
                    failures.append(value)
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        if failures:
            raise AssertionError("\n".join(failures))
        if silent:
            raise TimeoutError(f"ranks {list(silent)} did not answer in {seconds:g} s")
        return results

    def end(self) -> None:
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.kill()
            process.join()
            pipe.close()


def _environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """That of a rank of torchrun, whose agent holds the store."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _serve(
    environment: dict[str, str], device: str, joined: bool, prepare: Callable[[], None] | None, pipe: Connection
) -> None:
    parent = os.getppid()
    if prepare is not None:
        prepare()
    os.environ |= environment
    torch.set_num_threads(1)
    before = dict(os.environ)
    world = None
    while True:
        while not pipe.poll(1.0):
            # a test run that was killed leaves nobody who would end this process
            if os.getppid() != parent:
                return
        try:
            run, args, settings = pickle.loads(pipe.recv_bytes())
            if joined and world is None:
                world = join_world(device, timeout_seconds=60)
            elif not joined:
                # not at the end of the call before: who left first would have broken the others' last exchange
                leave_world()
            os.environ.clear()
            os.environ |= before
            # its counts are those of this call
            result = run(World() if world is None else replace(world), *args, **settings)
            pipe.send_bytes(pickle.dumps((True, result)))
        except BaseException:
            pipe.send_bytes(pickle.dumps((False, f"rank {environment['RANK']} raised\n{traceback.format_exc()}")))
            return


def free_port() -> int:
    """For a store that one of a test's own processes is to hold."""
    for number in _ports:
        port = _PORTS[number % len(_PORTS)]
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("unreachable")
