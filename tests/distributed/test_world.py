"""What ranks tell each other, on 2, 3 and 4 processes: rows in order, sums, and failures that reach everybody."""

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastgrpo.distributed.spread import Spread, pieces
from fastgrpo.distributed.world import RankFailure, World
from tests.ranks import Ranks, ranks_of_module

on_ranks = ranks_of_module()


@pytest.mark.parametrize(("total", "num_ranks"), [(1, 4), (6, 4), (7, 2), (8, 4), (0, 3)])
def test_rows_are_spread_evenly_and_each_once(total: int, num_ranks: int) -> None:
    spread = Spread.evenly(total, num_ranks)
    assert spread.order == tuple(range(total))
    sizes = [len(rows) for rows in spread.rows]
    assert max(sizes) - min(sizes) <= 1
    assert spread.most == -(-total // num_ranks)


def test_each_share_is_spread_evenly_and_a_rank_holds_the_first_share_first() -> None:
    spread = Spread.of_shares([[1, 3, 5, 7, 9], [0, 2, 4, 6, 8]], 2)
    # who has one more of the first has one less of the second
    assert spread.rows == ((1, 3, 5, 0, 2), (7, 9, 4, 6, 8))


@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=5), num_ranks=st.integers(1, 9))
def test_no_rank_has_more_than_one_row_more_of_any_share_or_of_all(sizes: list[int], num_ranks: int) -> None:
    total = sum(sizes)
    shares = [list(range(number, total * len(sizes), len(sizes)))[:size] for number, size in enumerate(sizes)]
    cut = pieces(shares, num_ranks)
    for number, share in enumerate(shares):
        assert [row for own in cut for row in own[number]] == share
        lengths = [len(own[number]) for own in cut]
        assert max(lengths) - min(lengths) <= 1
    totals = [sum(map(len, own)) for own in cut]
    assert max(totals) - min(totals) <= 1


def gather_squares(world: World, spread: Spread) -> list[list[float]]:
    rows = torch.tensor(spread.rows[world.rank], dtype=torch.float32)
    return world.gather(lambda: torch.stack([rows, rows**2], dim=1), spread, 2, "squares").tolist()


@pytest.mark.parametrize("spread", [Spread.evenly(5, 4), Spread(((2, 0), (), (1,))), Spread(((3, 1, 0, 2),))])
def test_gathered_rows_are_in_order_on_every_rank(spread: Spread, on_ranks: Ranks) -> None:
    num_ranks = len(spread.rows)
    found = [gather_squares(World(), spread)] if num_ranks == 1 else on_ranks(num_ranks, gather_squares, spread)
    expected = [[float(row), float(row**2)] for row in range(spread.total)]
    assert found == [expected] * num_ranks


def sum_own(world: World) -> list[list[float]]:
    tensors = [torch.full((2, 2), 1.0 + world.rank), torch.tensor([10.0 * world.rank])]
    world.sum_(tensors, "gradients")
    return [tensor.flatten().tolist() for tensor in tensors]


def test_sums_are_those_of_all_ranks(on_ranks: Ranks) -> None:
    assert on_ranks(3, sum_own) == [[[6.0] * 4, [30.0]]] * 3


def fail_on_rank_1(world: World) -> tuple[str, str, int]:
    def compute() -> torch.Tensor:
        if world.rank == 1:
            raise ValueError("no answer")
        return torch.ones(1, 1)

    try:
        world.gather(compute, Spread.evenly(2, 2), 1, "rewards")
    except RankFailure as error:
        # the world is whole after it
        return type(error.__cause__).__name__, str(error), sum(world.everyones(1, "counts"))
    raise AssertionError("nothing was raised")


def test_what_fails_on_one_rank_is_raised_on_all_and_they_can_go_on(on_ranks: Ranks) -> None:
    first, second = on_ranks(2, fail_on_rank_1)
    assert (first[0], second[0]) == ("NoneType", "ValueError")
    assert first[1] == second[1]
    assert first[1].startswith("rank 1 on ")
    assert first[1].endswith("ValueError: no answer")
    assert first[2] == second[2] == 2


def run_on_first(world: World) -> object:
    found = world.on_first(lambda: ["made by", world.rank], "a directory")
    try:
        world.on_first(lambda: 1 // 0, "a mistake")
    except (ZeroDivisionError, RankFailure) as error:
        return found, type(error).__name__
    raise AssertionError("nothing was raised")


def test_what_the_first_rank_does_or_raises_reaches_all(on_ranks: Ranks) -> None:
    assert on_ranks(2, run_on_first) == [(["made by", 0], "ZeroDivisionError"), (["made by", 0], "RankFailure")]


def tell_values(world: World) -> list[object]:
    # of another length on each rank, and what JSON has to write in its own way
    own = {"rank": world.rank, "text": "é" * world.rank, "numbers": [1.5, None, True][: world.rank]}
    return world.everyones(own, "values")


def test_values_of_any_length_reach_all(on_ranks: Ranks) -> None:
    expected = [
        {"rank": 0, "text": "", "numbers": []},
        {"rank": 1, "text": "é", "numbers": [1.5]},
        {"rank": 2, "text": "éé", "numbers": [1.5, None]},
    ]
    assert on_ranks(3, tell_values) == [expected] * 3


def show_images(world: World) -> dict[str, list[float]]:
    # of the first rank none, and of the others of several types and shapes
    own = {
        f"{world.rank} {n}": torch.full((n, 2), 0.5 * world.rank, dtype=torch.float16)
        for n in range(world.rank % 2 * 2)
    }
    if world.rank == 2:
        own["whole numbers"] = torch.arange(3)
    return {name: tensor.flatten().tolist() for name, tensor in world.to_first(own, "images").items()}


def test_named_tensors_reach_the_first_rank_alone(on_ranks: Ranks) -> None:
    first, *others = on_ranks(3, show_images)
    assert first == {"1 0": [], "1 1": [0.5, 0.5], "whole numbers": [0, 1, 2]}
    assert others == [{}, {}]
    alone = World().to_first({"a": torch.ones(2)}, "images")
    assert alone["a"].tolist() == [1.0, 1.0]


def send_what_json_has_not(world: World) -> str:
    try:
        world.on_first(lambda: {1, 2}, "a set")
    except (TypeError, RankFailure) as error:
        return f"{type(error).__name__} {world.everyones(world.rank, 'ranks')}"
    return "nothing"


def test_what_json_has_not_is_an_error_on_all_and_they_go_on(on_ranks: Ranks) -> None:
    assert on_ranks(2, send_what_json_has_not) == ["TypeError [0, 1]", "RankFailure [0, 1]"]


def end_badly(world: World, how: str) -> int:
    if world.rank == 1 and how == "raise":
        raise ArithmeticError("cannot")
    if world.rank == 1 and how == "die":
        os._exit(1)
    if how:
        world.barrier("what does not come")
    return os.getpid()


def test_a_rank_that_ends_badly_fails_its_test_and_the_next_test_has_new_ranks(on_ranks: Ranks) -> None:
    processes = set(on_ranks(2, end_badly, ""))
    for how, told in (("raise", r"rank 1 raised\n(.|\n)*ArithmeticError: cannot"), ("die", "rank 1 died")):
        assert set(on_ranks(2, end_badly, "")) == processes
        with pytest.raises(AssertionError, match=told):
            on_ranks(2, end_badly, how)
        processes, before = set(on_ranks(2, end_badly, "")), processes
        assert processes.isdisjoint(before)


_READS = (Tensor.cpu, Tensor.tolist, Tensor.item, Tensor.__bool__)


class Reads(TorchFunctionMode):
    """What a world said that it waits in, whenever the host read a tensor: on a GPU it is there that it waits."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world, self.waiting_in = world, list[str]()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _READS:
            self.waiting_in.append(self.world.waiting_in)
        return function(*args, **(kwargs or {}))


def test_a_rank_says_what_it_waits_in_while_it_reads_what_nccl_only_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    # as NCCL's: it returns before the others have come
    monkeypatch.setattr(dist, "all_gather", lambda rooms, own, group: [room.copy_(own) for room in rooms])
    world = World(rank=0, size=2)
    with Reads(world) as reads:
        table = world.table(torch.tensor([1.0, 2.0]), "statistics")
        assert reads.waiting_in == ["statistics"]
        world.gather(lambda: torch.ones(1, 1), Spread.evenly(2, 2), 1, "rewards")
        assert reads.waiting_in == ["statistics", "rewards"]
    assert table.tolist() == [[1.0, 2.0]] * 2
    assert (world.waiting_in, world.num_exchanges) == ("", 2)


def test_a_rank_whose_gpu_has_failed_raises_that_and_asks_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Tensor:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(dist, "all_gather", lambda *_, **__: pytest.fail("a broken GPU was used"))
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        World(rank=0, size=2).gather(fail, Spread.evenly(2, 2), 1, "rewards")
