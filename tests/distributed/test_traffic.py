"""Collectives are counted as what they are: every kind, every caller, with bytes worked out by hand."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from benchmarks.scaling.measured import compare
from fastgrpo.distributed.spread import Spread
from fastgrpo.distributed.traffic import Collective, Traffic, wire_bytes
from fastgrpo.distributed.world import World
from fastgrpo.profiling.timing import StageTimer
from tests.ranks import Ranks, ranks_of_module

CPU = torch.device("cpu")

on_ranks = ranks_of_module()


def told(traffic: Traffic) -> list[tuple[str, str, int, int]]:
    """Stage, kind, payload bytes and calls, as the scaling benchmark puts them beside what it expects."""
    return [(line.stage, line.kind, line.payload_bytes, line.measured_calls) for line in compare([], traffic.take())]


def call_every_kind(world: World) -> list[tuple[str, str, int, int]]:
    """Calls on 6 float32 numbers of each rank, each kind in a stage of its name."""
    own, whole, ranks = torch.ones(6), torch.empty(6 * world.size), range(world.size)
    is_first = world.is_first
    calls = {
        "all_reduce": lambda: dist.all_reduce(own),
        "all_gather": lambda: dist.all_gather_into_tensor(whole, own),
        "all_gather of a list": lambda: dist.all_gather([torch.empty(6) for _ in ranks], own),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(torch.empty(6), whole),
        "broadcast": lambda: dist.broadcast(own, 0),
        "reduce": lambda: dist.reduce(own, 0),
        "gather": lambda: dist.gather(own, [torch.empty(6) for _ in ranks] if is_first else None),
        "scatter": lambda: dist.scatter(own, [torch.ones(6) for _ in ranks] if is_first else None),
        "all_to_all": lambda: dist.all_to_all_single(torch.empty_like(whole), whole),
        "barrier": lambda: dist.barrier(),
    }
    timer = StageTimer(CPU)
    with Traffic() as traffic:
        for stage, call in calls.items():
            with timer(stage):
                call()
    return told(traffic)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_each_kind_is_counted_in_its_stage_and_equally_on_all_ranks(on_ranks: Ranks) -> None:
    part, whole = 24, 3 * 24
    for found in on_ranks(3, call_every_kind):
        assert found == [
            ("all_reduce", "all_reduce", part, 1),
            ("all_gather", "all_gather", whole, 1),
            ("all_gather of a list", "all_gather", whole, 1),
            ("reduce_scatter", "reduce_scatter", whole, 1),
            ("broadcast", "broadcast", part, 1),
            ("reduce", "reduce", part, 1),
            ("gather", "gather", whole, 1),
            ("scatter", "scatter", whole, 1),
            ("all_to_all", "all_to_all", whole, 1),
            ("barrier", "barrier", 0, 1),
        ]


def send_and_receive(world: World) -> list[tuple[str, int]]:
    with Traffic() as traffic:
        if world.is_first:
            dist.send(torch.ones(5, dtype=torch.float64), 1)
        else:
            dist.recv(torch.empty(5, dtype=torch.float64))
    return [(one.kind, one.payload_bytes) for one in traffic.take()]


def test_what_one_rank_sends_to_another_is_counted_at_both_ends(on_ranks: Ranks) -> None:
    assert on_ranks(2, send_and_receive) == [[("send", 40)], [("recv", 40)]]


def tell_as_a_world(world: World) -> list[tuple[str, str, str, tuple[tuple[int, ...], ...], int, int]]:
    spread = Spread.evenly(5, world.size)
    own = torch.zeros(len(spread.rows[world.rank]), 2)
    with Traffic() as traffic:
        world.gather(lambda: own, spread, 2, "rewards")
        world.sum_([torch.ones(3, 2), torch.ones(4)], "gradients")
        world.table(torch.ones(7, dtype=torch.float64), "seconds")
        world.everyones("abc", "names")
    counts = traffic.take()
    assert not traffic.take()
    return [(one.kind, one.stage, one.dtype, one.shapes, one.payload_bytes, count) for one, count in counts.items()]


def test_what_a_world_tells_is_what_its_methods_say(on_ranks: Ranks) -> None:
    first, second = on_ranks(2, tell_as_a_world)
    assert first == second
    stage = "between stages"
    assert first[:3] == [
        # 3 rows at most, and one that says whether to believe them
        ("all_gather", stage, "float32", ((4, 2),), 2 * 4 * 2 * 4, 1),
        ("all_reduce", stage, "float32", ((10,),), 40, 1),
        ("all_gather", stage, "float64", ((7,),), 2 * 7 * 8, 1),
    ]
    # values travel as the length of their JSON and its bytes
    assert first[3:] == [
        ("all_gather", stage, "int64", ((1,),), 2 * 8, 1),
        ("all_gather", stage, "uint8", ((len('"abc"'),),), 2 * len('"abc"'), 1),
    ]


def whole(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.full_tensor()


def train_sharded(world: World) -> list[tuple[str, str, int, int]]:
    mesh = init_device_mesh("cpu", (world.size,))
    layers = [nn.Linear(8, 8, bias=False), nn.Linear(8, 4, bias=False)]
    net = nn.Sequential(*layers)
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    timer = StageTimer(CPU)
    with Traffic() as traffic:
        with timer("forward"):
            y = net(torch.ones(2, 8))
        with timer("backward"):
            y.sum().backward()
        with timer("clip"):
            whole(nn.utils.clip_grad_norm_(net.parameters(), 1.0))
        with timer("gather"):
            whole(layers[0].weight)
    return told(traffic)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_fsdp_and_dtensors_tell_is_seen_in_backward_passes_too(on_ranks: Ranks) -> None:
    first, second = 8 * 8 * 4, 8 * 4 * 4
    for found in on_ranks(2, train_sharded):
        assert sorted(found) == [
            ("backward", "all_gather", second, 1),
            ("backward", "all_gather", first, 1),
            ("backward", "reduce_scatter", second, 1),
            ("backward", "reduce_scatter", first, 1),
            # one norm a weight
            ("clip", "all_reduce", 2 * 4, 1),
            ("forward", "all_gather", second, 1),
            ("forward", "all_gather", first, 1),
            ("gather", "all_gather", first, 1),
        ]


def reduce_by_ring(world: World, numbers: int) -> tuple[list[float], float]:
    """An all_reduce made of sends to the next rank; the sums, and the bytes that this rank sent."""
    pieces = list((torch.arange(float(numbers)) * (world.rank + 1)).chunk(world.size))
    following, previous = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    with Traffic() as traffic:
        for turn in range(2 * (world.size - 1)):
            place = (world.rank - turn) % world.size
            sent = dist.isend(pieces[place].clone(), following)
            received = torch.empty_like(pieces[place - 1])
            dist.recv(received, previous)
            # the first round sums, the second hands sums on
            pieces[place - 1] = pieces[place - 1] + received if turn < world.size - 1 else received
            assert sent is not None
            sent.wait()
    sent_bytes = sum(count * one.wire_bytes for one, count in traffic.take().items() if one.kind == "send")
    return torch.cat(pieces).tolist(), sent_bytes


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_an_all_reduce_has_the_wire_bytes_that_a_ring_of_sends_has(num_ranks: int, on_ranks: Ranks) -> None:
    numbers = 12 * num_ranks
    sums = [float(i * sum(range(1, num_ranks + 1))) for i in range(numbers)]
    for found in on_ranks(num_ranks, reduce_by_ring, numbers):
        assert found == (sums, wire_bytes("all_reduce", 4 * numbers, num_ranks))


def test_wire_bytes_are_those_of_the_busiest_link() -> None:
    assert wire_bytes("all_gather", 800, 8) == 700
    assert wire_bytes("broadcast", 800, 8) == 800
    assert wire_bytes("all_reduce", 800, 1) == 0
    one = Collective("update", "all_reduce", 4, "float32", ((10,),), 40)
    other = Collective("update", "send", 4, "float32", ((3,),), 12)
    assert (one.wire_bytes, other.wire_bytes) == (60, 12)


def run_compiled(world: World) -> tuple[int, int]:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    double = torch.compile(lambda x: 2 * x, backend=backend)
    with Traffic() as traffic:
        world.sum_([double(torch.ones(3))], "numbers")
    return len(graphs), traffic.take().total()


def test_compiled_functions_stay_compiled_while_traffic_is_counted(on_ranks: Ranks) -> None:
    assert on_ranks(2, run_compiled) == [(1, 1)] * 2


def test_an_operator_that_nobody_knows_is_refused() -> None:
    library = torch.library.Library("_dtensor", "FRAGMENT")
    library.define("send_secretly(Tensor x) -> Tensor")
    library.impl("send_secretly", lambda x: x.clone(), "CPU")
    with Traffic(), pytest.raises(NotImplementedError, match="_dtensor::send_secretly moves bytes that nobody counts"):
        torch.ops._dtensor.send_secretly(torch.ones(1))
