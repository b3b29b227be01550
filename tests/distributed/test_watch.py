"""A rank that raises, dies, falls silent or hangs ends the run on all ranks, each of which names it."""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastgrpo.distributed.failure import Failure
from fastgrpo.distributed.spread import Spread
from fastgrpo.distributed.standing import Signs, Standing, is_held_up, suspects, table
from fastgrpo.distributed.watch import Watch
from fastgrpo.distributed.world import RankFailure, World, join_world
from fastgrpo.profiling.timing import StageTimer
from tests.ranks import free_port

PATIENCE_SECONDS = 60.0
HOST = socket.gethostname()


class Agreed(Exception):
    """What all ranks raise together."""


def run_ranks(
    num_ranks: int, run: Callable[..., None], directory: Path, stopped: int = -1, exchange_seconds: float = 20.0
) -> tuple[list[int | None], list[str]]:
    """Exit codes of ranks that call ``run(world, watch)`` inside a watch, None of one that is stopped, and stderr."""
    context, port = multiprocessing.get_context("fork"), free_port()
    logs = [directory / f"{rank}.txt" for rank in range(num_ranks)]
    ranks = [
        context.Process(target=main, args=(rank, num_ranks, port, logs[rank], run, exchange_seconds))
        for rank in range(num_ranks)
    ]
    for process in ranks:
        process.start()
    try:
        for rank, process in enumerate(ranks):
            process.join(0 if rank == stopped else PATIENCE_SECONDS)
        return [process.exitcode for process in ranks], [log.read_text() for log in logs]
    finally:
        for process in ranks:
            process.kill()
            process.join()


def main(rank: int, num_ranks: int, port: int, log: Path, run: Callable[..., None], exchange_seconds: float) -> None:
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    world = join_world("cpu", timeout_seconds=exchange_seconds)
    # what the watch believes is the longer of the two where a test wants to see exchanges fail
    limit_seconds = 2.0 if exchange_seconds > 2.0 else 20.0
    watch = Watch(
        world=world, timeout_seconds=limit_seconds, every_seconds=0.1, dead_after_seconds=1.5, agreed=(Agreed,)
    )
    with watch:
        watch.iteration = lambda: 7
        with StageTimer(world.device)("rollout"):
            run(world, watch)


def wait_for_others(world: World) -> None:
    world.barrier("something")


def all_succeed(world: World, _: Watch) -> None:
    wait_for_others(world)
    # ranks end one after the other, the one that holds the store first, and longer apart than a rank may be silent
    time.sleep(0.9 * world.rank)


def test_ranks_that_end_apart_all_end_well(tmp_path: Path) -> None:
    assert run_ranks(3, all_succeed, tmp_path) == ([0, 0, 0], ["", "", ""])


def one_raises(world: World, _: Watch) -> None:
    if world.rank == 1:
        raise FloatingPointError("not finite\nsecond line")
    wait_for_others(world)


def test_what_one_rank_raises_is_told_by_all_and_ends_them(tmp_path: Path) -> None:
    codes, logs = run_ranks(3, one_raises, tmp_path)
    assert codes == [1, 1, 1]
    headline = f"fastgrpo: rank 1 on {HOST} raised FloatingPointError: not finite (iteration 7)\n"
    assert headline in logs[0]
    assert "in one_raises" in logs[0]
    # one rank a machine shows the traceback; the rank itself shows its own
    assert logs[2] == headline
    assert "fastgrpo:" not in logs[1]
    assert logs[1].endswith("FloatingPointError: not finite\nsecond line\n")


def all_raise(world: World, _: Watch) -> None:
    time.sleep(0.4 * world.rank)
    raise Agreed("stopped")


def test_what_all_ranks_raise_together_stays_as_it_is(tmp_path: Path) -> None:
    codes, logs = run_ranks(2, all_raise, tmp_path)
    assert codes == [1, 1]
    for log in logs:
        assert log.endswith("Agreed: stopped\n")
        assert "fastgrpo:" not in log


def fail_in_gather(world: World, _: Watch) -> None:
    def compute() -> torch.Tensor:
        if world.rank == 1:
            raise FloatingPointError("no score")
        return torch.ones(1, 1)

    world.gather(compute, Spread.evenly(2, 2), 1, "rewards")


def test_where_all_raise_because_of_one_its_traceback_is_shown(tmp_path: Path) -> None:
    codes, logs = run_ranks(2, fail_in_gather, tmp_path)
    assert codes == [1, 1]
    assert "in compute" in logs[0]
    assert RankFailure.__name__ in logs[0]
    assert f"fastgrpo: rank 1 on {HOST} raised FloatingPointError: no score" in logs[0]
    assert "fastgrpo:" not in logs[1]


def one_is_killed(world: World, _: Watch) -> None:
    time.sleep(0.5)
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(PATIENCE_SECONDS)


def test_a_killed_rank_is_noticed_at_once_by_ranks_that_compute(tmp_path: Path) -> None:
    begun = time.monotonic()
    codes, logs = run_ranks(3, one_is_killed, tmp_path)
    assert time.monotonic() - begun < 10
    assert codes == [1, -signal.SIGKILL, 1]
    headline = f"fastgrpo: rank 1 on {HOST} died, killed or by a crash outside Python, last iteration 7, rollout\n"
    assert logs[0].startswith(headline)
    assert "where the ranks stood:\n" in logs[0]
    assert logs[2] == headline


def the_first_is_killed(world: World, _: Watch) -> None:
    # it holds the store; the others wait in an exchange, which fails
    if world.is_first:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    wait_for_others(world)


def test_the_rank_that_holds_the_store_may_be_killed(tmp_path: Path) -> None:
    codes, logs = run_ranks(3, the_first_is_killed, tmp_path)
    assert codes == [-signal.SIGKILL, 1, 1]
    for log in logs[1:]:
        assert f"rank 0 on {HOST} died" in log or "held by the first rank or its launcher, is gone" in log


def one_is_stopped(world: World, _: Watch) -> None:
    time.sleep(0.5)
    if world.rank == 2:
        os.kill(os.getpid(), signal.SIGSTOP)
    wait_for_others(world)


def test_a_stopped_rank_is_silent_and_named(tmp_path: Path) -> None:
    codes, logs = run_ranks(3, one_is_stopped, tmp_path, stopped=2)
    assert codes == [1, 1, None]
    for log in logs[:2]:
        assert f"fastgrpo: rank 2 on {HOST} gave no sign of life for 1.5 s, last iteration 7" in log


def the_first_is_stopped(world: World, _: Watch) -> None:
    if world.is_first:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(PATIENCE_SECONDS)


def test_a_stopped_rank_that_holds_the_store_is_noticed(tmp_path: Path) -> None:
    codes, logs = run_ranks(2, the_first_is_stopped, tmp_path, stopped=0)
    assert codes == [None, 1]
    assert "held by the first rank or its launcher, has not answered for 1.5 s" in logs[1]


def one_hangs(world: World, _: Watch) -> None:
    if world.rank == 1:
        wait_in_vain()
    world.barrier("gradients")


def wait_in_vain() -> None:
    time.sleep(PATIENCE_SECONDS)


def test_the_rank_that_others_wait_for_is_named_with_its_stack(tmp_path: Path) -> None:
    codes, logs = run_ranks(3, one_hangs, tmp_path)
    assert codes == [1, 1, 1]
    headline = f"fastgrpo: rank 1 on {HOST} held up the others in 'gradients': iteration 7, rollout\n"
    assert logs[0].startswith(headline)
    assert f"rank 1 on {HOST} is here:\n" in logs[0]
    assert "in wait_in_vain" in logs[0]
    assert f"rank 2 on {HOST}: iteration 7, rollout, waiting in 'gradients'" in logs[0]
    for log in logs[1:]:
        # c10d may add that the store is gone, which the first rank held
        assert log.startswith(headline)
        assert "is here" not in log


def test_an_exchange_that_fails_asks_the_rank_that_was_missing_for_its_stack(tmp_path: Path) -> None:
    codes, logs = run_ranks(3, one_hangs, tmp_path, exchange_seconds=1.0)
    assert codes == [1, 1, 1]
    headline = f"fastgrpo: rank 1 on {HOST} held up the others in 'gradients': iteration 7, rollout\n"
    assert headline in logs[0]
    assert "in wait_in_vain" in logs[0]
    # and that of the rank itself, which raised because nobody came
    assert "gloo" in logs[0].splitlines()[-1]
    assert logs[1] == headline


def a_long_rollout(world: World, _: Watch) -> None:
    wait_for_others(world)
    # twice as long as a rank may be silent, and as long as others may wait but for the last exchange
    deadline = time.monotonic() + 3.0
    while time.monotonic() < deadline:
        torch.randn(64, 64) @ torch.randn(64, 64)
        # other tests want to compute as well
        time.sleep(0.005)
    wait_for_others(world)


def test_ranks_that_compute_for_long_are_left_alone(tmp_path: Path) -> None:
    assert run_ranks(2, a_long_rollout, tmp_path) == ([0, 0], ["", ""])


def test_a_single_process_is_not_watched() -> None:
    with pytest.raises(FloatingPointError), Watch(world=World(), timeout_seconds=1.0):
        raise FloatingPointError


def test_a_rank_may_miss_signs_before_it_is_dead() -> None:
    with pytest.raises(ValueError, match="every 10 s cannot be held for dead after 20 s"):
        Watch(world=World(), timeout_seconds=1.0, every_seconds=10, dead_after_seconds=20)


def standing(rank: int, num_exchanges: int, waiting_in: str = "", seconds: float = 0.0) -> Standing:
    return Standing(
        rank=rank,
        host="node",
        process="",
        machine="",
        iteration=3,
        stage="update",
        waiting_in=waiting_in,
        num_exchanges=num_exchanges,
        seconds=seconds,
    )


@pytest.mark.parametrize(
    ("standings", "blamed"),
    [
        ([standing(0, 5, "a"), standing(1, 4), standing(2, 5, "a")], [1]),
        # waiting in an earlier exchange than the others, in which they must already have been
        ([standing(0, 5, "a"), standing(1, 4, "b")], [1]),
        ([standing(0, 5, "a"), standing(1, 5)], [1]),
        ([standing(0, 5, "a"), standing(1, 5, "a")], [0, 1]),
    ],
    ids=["behind", "in another exchange", "not waiting", "all"],
)
def test_blamed_is_whoever_began_fewest_exchanges_and_does_not_wait(
    standings: list[Standing], blamed: list[int]
) -> None:
    assert [found.rank for found in suspects(standings)] == blamed


def test_held_up_is_who_began_an_exchange_long_ago_that_another_has_not_begun() -> None:
    assert is_held_up([standing(0, 5, "a", seconds=61), standing(1, 4, seconds=3)], 60)
    assert not is_held_up([standing(0, 5, "a", seconds=59), standing(1, 4, seconds=100)], 60)
    # long since the last exchange: a rollout
    assert not is_held_up([standing(0, 5, seconds=500), standing(1, 5, seconds=500)], 60)


def test_silent_is_who_does_not_change_in_so_many_looks() -> None:
    signs = Signs([0, 1], most_looks=2)
    changing, still = [standing(0, 5, seconds=float(look)) for look in range(5)], standing(1, 5)
    found = [[who.rank for who in signs.look([sign, still])] for sign in changing[:4]]
    assert found == [[], [], [1], [1]]
    assert signs.look([changing[4], standing(1, 6)]) == []


def test_the_table_shows_those_behind_first_and_stops_somewhere() -> None:
    text = table([standing(0, 5, "a", seconds=9), standing(1, 5), standing(2, 4)], most=2)
    assert text.splitlines() == [
        "  rank 2 on node: iteration 3, update; 4 exchanges",
        "  rank 1 on node: iteration 3, update; 5 exchanges",
        "  and 1 more",
    ]


def test_a_failure_travels_whole() -> None:
    failure = Failure(culprits=(1, 2), headline="a", text="b", is_echo=True)
    assert Failure.of_values(failure.values) == failure
