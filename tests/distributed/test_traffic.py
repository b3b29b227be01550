"""Collectives are counted as what they are: every kind, every caller, with bytes worked out by hand."""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fastgrpo.distributed.spread import Spread
from fastgrpo.distributed.traffic import Collective, Total, Traffic, by_stage_and_kind, total, wire_bytes
from fastgrpo.distributed.world import World
from fastgrpo.profiling.timing import StageTimer
from tests.ranks import on_ranks

CPU = torch.device("cpu")


def call_every_kind(world: World) -> dict[str, tuple[int, int]]:
    """Kind -> calls and payload bytes of calls on 6 float32 numbers of each rank, each kind in a stage of its name."""
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
    found = by_stage_and_kind(traffic.take())
    assert all(stage.startswith(kind) for stage, kind in found)
    return {stage: (one.calls, one.payload_bytes) for (stage, _), one in found.items()}


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_each_kind_is_counted_in_its_stage_and_equally_on_all_ranks(num_ranks: int) -> None:
    part, whole = (1, 24), (1, 24 * num_ranks)
    for found in on_ranks(num_ranks, call_every_kind):
        assert found == {
            "all_reduce": part,
            "all_gather": whole,
            "all_gather of a list": whole,
            "reduce_scatter": whole,
            "broadcast": part,
            "reduce": part,
            "gather": whole,
            "scatter": whole,
            "all_to_all": whole,
            "barrier": (1, 0),
        }


def send_and_receive(world: World) -> list[tuple[str, int]]:
    with Traffic() as traffic:
        if world.is_first:
            dist.send(torch.ones(5, dtype=torch.float64), 1)
        else:
            dist.recv(torch.empty(5, dtype=torch.float64))
    return [(one.kind, one.payload_bytes) for one in traffic.take()]


def test_what_one_rank_sends_to_another_is_counted_at_both_ends() -> None:
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


def test_what_a_world_tells_is_what_its_methods_say() -> None:
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


def train_sharded(world: World) -> dict[tuple[str, str], tuple[int, int]]:
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
    found = by_stage_and_kind(traffic.take())
    return {pair: (one.calls, one.payload_bytes) for pair, one in found.items()}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_fsdp_and_dtensors_tell_is_seen_in_backward_passes_too() -> None:
    weights = (8 * 8 + 8 * 4) * 4
    for found in on_ranks(2, train_sharded):
        assert found == {
            ("forward", "all_gather"): (2, weights),
            ("backward", "all_gather"): (2, weights),
            ("backward", "reduce_scatter"): (2, weights),
            # one norm a weight
            ("clip", "all_reduce"): (1, 2 * 4),
            ("gather", "all_gather"): (1, 8 * 8 * 4),
        }


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
    sends = {one: count for one, count in traffic.take().items() if one.kind == "send"}
    return torch.cat(pieces).tolist(), total(sends).wire_bytes


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_an_all_reduce_has_the_wire_bytes_that_a_ring_of_sends_has(num_ranks: int) -> None:
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
    assert total(Counter({one: 2, other: 1})) == Total(3, 92, 2 * 60 + 12)


def run_compiled(world: World) -> tuple[int, int]:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    double = torch.compile(lambda x: 2 * x, backend=backend)
    with Traffic() as traffic:
        world.sum_([double(torch.ones(3))], "numbers")
    return len(graphs), total(traffic.take()).calls


def test_compiled_functions_stay_compiled_while_traffic_is_counted() -> None:
    assert on_ranks(2, run_compiled) == [(1, 1)] * 2


def test_an_operator_that_nobody_knows_is_refused() -> None:
    library = torch.library.Library("_dtensor", "FRAGMENT")
    library.define("send_secretly(Tensor x) -> Tensor")
    library.impl("send_secretly", lambda x: x.clone(), "CPU")
    with Traffic(), pytest.raises(NotImplementedError, match="_dtensor::send_secretly moves bytes that nobody counts"):
        torch.ops._dtensor.send_secretly(torch.ones(1))
