"""The scaling model: what a run tells is what is expected of it, and predictions are sums that were done by hand."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from torch import nn

from benchmarks.scaling.cases import expected, latent_bytes, network_of
from benchmarks.scaling.cluster import Cluster
from benchmarks.scaling.efficiency import Speed, expected_maximum, predict, rows_computed, told
from benchmarks.scaling.exchanges import Exchange
from benchmarks.scaling.measured import Line, compare, largest_besides_weights, run
from benchmarks.scaling.sharded import Passes, filled_up, of_shards, units_of
from benchmarks.scaling.tables import predictions
from benchmarks.scaling.timed import Case, Timed, cases_of, efficiencies
from benchmarks.scaling.workload import Workload, meta_transformer, num_trained, workloads
from fastgrpo.assembly import build_trainer
from fastgrpo.config import load_config
from fastgrpo.distributed.traffic import Collective, Traffic
from fastgrpo.distributed.world import World
from fastgrpo.pieces import build
from fastgrpo.records.record import NoRecord
from fastgrpo.rewards.ranks import PolicyRank
from tests.ranks import Ranks, ranks_of_module
from tests.tiny_config import make_overrides

SIMPLE = Cluster(
    gpus_per_node=4,
    node_bytes_per_second=100.0,
    network_bytes_per_second=10.0,
    reached_share=0.5,
    call_seconds=1.0,
    ring_hop_seconds=0.1,
    tree_hop_seconds=0.2,
    network_hop_seconds=3.0,
    tree_share=1.0,
)
WORK = Workload(
    name="work",
    num_weights=10,
    units=(),
    forward_flops=1.0,
    backward_flops=2.0,
    decode_flops=5.0,
    num_steps=3,
    branches=2,
    has_reference=True,
    micro_batch=4,
    optimizer_steps=2,
)
NOTHING_BUT_WORK = Speed(flops_per_second=1.0, variation=0.0)

on_ranks = ranks_of_module()


@pytest.fixture(scope="module")
def published() -> list[Workload]:
    return workloads()


def config_of(weights: Path, output: Path, words: tuple[str, ...]) -> DictConfig:
    overrides = make_overrides(weights, output, *words)
    if "adaptation=full" in words:
        overrides = [word for word in overrides if not word.startswith(("adaptation.rank", "adaptation.alpha"))]
    return load_config("train", overrides)


def train_and_compare(world: World, config: DictConfig) -> list[tuple[list[Line], float]]:
    trainer = build_trainer(config, PolicyRank(world=world))
    # pictures and curves are told to nobody
    trainer.record = NoRecord()
    lines = [compare(expected(config, world.size), counts) for counts in run(trainer).iterations]
    return [(part, largest_besides_weights(part, world.size)) for part in lines]


@pytest.mark.parametrize(
    ("num_ranks", "words"),
    [
        (2, ("train.optimizer_steps=2",)),
        (2, ("train.prompts_per_iteration=1", "train.group_size=3")),
        (
            2,
            (
                "algorithm=smart_grpo_paper",
                "algorithm.noise.candidates=6",
                "algorithm.noise.elites=3",
                "algorithm.schedule.num_steps=4",
            ),
        ),
    ],
    ids=["two steps", "uneven", "search"],
)
def test_adapters_tell_gradients_rewards_and_statistics_and_nothing_else(
    tiny_weights: Path, tmp_path: Path, num_ranks: int, words: tuple[str, ...], on_ranks: Ranks
) -> None:
    config = config_of(tiny_weights, tmp_path / "run", words)
    for iterations in on_ranks(num_ranks, train_and_compare, config):
        assert len(iterations) == 2
        for lines, largest in iterations:
            assert [line for line in lines if not line.agrees] == []
            (gradients,) = (line for line in lines if line.what == "gradients")
            assert gradients.measured_calls == config.train.optimizer_steps
            # neither a latent nor an image fits into anything else
            assert 0 < largest < latent_bytes(config)


@pytest.mark.parametrize("rollout_weights", ["gathered", "sharded"])
def test_spread_weights_tell_what_their_shapes_and_passes_say(
    tiny_weights: Path, tmp_path: Path, rollout_weights: str, on_ranks: Ranks
) -> None:
    overrides = ("train.optimizer_steps=2", "train.iterations=1", "model.guidance_scale=2.5")
    words = ("adaptation=full", f"adaptation.rollout_weights={rollout_weights}", *overrides)
    for iterations in on_ranks(2, train_and_compare, config_of(tiny_weights, tmp_path / "run", words)):
        for lines, _ in iterations:
            assert [line for line in lines if not line.agrees] == []
            assert {line.what for line in lines} >= {"weights", "gradients", "norms"}


def sum_of_adapters(world: World, shapes: list[torch.Size]) -> list[tuple[str, int, int]]:
    with Traffic() as traffic:
        world.sum_([torch.zeros(shape) for shape in shapes], "gradients")
    return [(one.kind, one.payload_bytes, count) for one, count in traffic.take().items()]


def test_the_adapters_of_sd3_medium_are_summed_in_one_call_of_75_megabytes(
    published: list[Workload], on_ranks: Ranks
) -> None:
    config = load_config("train", ["model=sd35_medium"])
    adapters = build(config.adaptation)(meta_transformer(config)).trainable
    counted = on_ranks(2, sum_of_adapters, [weight.shape for weight in adapters.values()])
    (gradients,) = (one for one in told(published[0], 2, 1152) if one.what == "gradients")
    assert counted == [[("all_reduce", gradients.payload_bytes, 1)]] * 2
    assert gradients == Exchange("gradients", "update", "all_reduce", 18_776_064 * 4, calls=2)


def test_all_else_that_sd3_medium_tells_is_smaller_than_a_latent(published: list[Workload]) -> None:
    adapters = published[0]
    for num_gpus in (8, 64, 576):
        others = [one for one in told(adapters, num_gpus, 1152) if one.what != "gradients"]
        assert {one.what for one in others} == {"rewards", "statistics", "seconds"}
        assert max(one.payload_bytes / num_gpus for one in others) < 16 * 64 * 64 * 2
        assert all(one.calls == 1 for one in others)


def test_what_was_not_expected_and_what_did_not_come_are_lines_that_disagree() -> None:
    came = Collective("update", "all_reduce", 2, "float32", ((10,),), 40)
    images = Collective("rollout", "all_gather", 2, "float32", ((2, 3, 8, 8),), 3072)
    lines = compare(
        [Exchange("gradients", "update", "all_reduce", 40, 2), Exchange("rewards", "reward", "all_gather", 8)],
        Counter({came: 2, images: 1}),
    )
    assert lines == [
        Line("gradients", "update", "all_reduce", 40, 2, 2, 80.0),
        Line("rewards", "reward", "all_gather", 8, 1, 0, 0.0),
        Line("not expected", "rollout", "all_gather", 3072, 0, 1, 1536.0),
    ]
    assert [line.agrees for line in lines] == [True, False, False]
    assert largest_besides_weights(lines, 2) == 1536


def test_units_are_all_weights_once_and_are_filled_up_by_first_dimensions(tiny_weights: Path) -> None:
    network = network_of(tiny_weights)
    units = units_of(network)
    # of both blocks two layers of modulations and the rest, and the rest of the network
    assert len(units) == 2 * 3 + 1
    assert sorted(shape for unit in units for shape in unit) == sorted(tuple(w.shape) for w in network.parameters())
    assert filled_up(((5, 2), (4,)), 4) == 8 * 2 + 4
    assert sum(filled_up(unit, 1) for unit in units) == sum(weight.numel() for weight in network.parameters())


def test_nodes_with_copies_of_the_weights_sum_each_ranks_part_of_the_gradient() -> None:
    passes = Passes(gathered={"rollout": 1}, rollout=0, policy=3, backward=2, reference=1, optimizer_steps=1)
    # on 4 ranks 7 x 3 numbers are filled up to 8 x 3, of which each rank has 6
    assert of_shards([((7, 3),)], 4, passes, compute_bytes=2, over_nodes=True) == [
        Exchange("weights", "rollout", "all_gather", 48, 1),
        Exchange("weights", "update", "all_gather", 48, 6),
        Exchange("gradients", "update", "reduce_scatter", 96, 2),
        Exchange("gradients over nodes", "update", "all_reduce", 24, 1),
        Exchange("norms", "update", "all_reduce", 4, 1),
    ]


def test_seconds_of_exchanges_are_calls_hops_and_bytes() -> None:
    # a node of 4: 1 + 3 hops + 3 / 4 of the bytes at 50 a second
    assert SIMPLE.seconds("all_gather", 400, 4) == pytest.approx(1 + 3 * 0.1 + 300 / 50)
    # 2 nodes: 6 hops within, 1 across; four adapters of 5 a second are shared by the rings
    assert SIMPLE.seconds("reduce_scatter", 800, 8) == pytest.approx(1 + 6 * 0.1 + 3 + 700 / 20)
    # an all_reduce goes around twice, or over 8 nodes, where that is faster, up and down a tree of 3 levels
    assert SIMPLE.seconds("all_reduce", 8, 32) == pytest.approx(1 + 2 * (3 * 0.2 + 3 * 3) + 16 / 20)
    assert SIMPLE.seconds("all_reduce", 8, 4) == pytest.approx(1 + 2 * 3 * 0.1 + 12 / 50)
    # one rank of each of 2 nodes has one adapter
    assert SIMPLE.seconds("all_gather", 100, 2, per_node=1) == pytest.approx(1 + 3 + 50 / 5)
    assert SIMPLE.seconds("all_gather", 100, 1) == 0
    with pytest.raises(ValueError, match="reached_share of a cluster must be positive, got 0"):
        replace(SIMPLE, reached_share=0)


def test_the_slowest_of_normal_ranks_is_as_late_as_order_statistics_say() -> None:
    assert expected_maximum(1) == pytest.approx(0, abs=1e-6)
    assert expected_maximum(2) == pytest.approx(1 / math.sqrt(math.pi), abs=1e-6)
    assert expected_maximum(3) == pytest.approx(1.5 / math.sqrt(math.pi), abs=1e-6)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(20_000, 64, generator=generator).amax(dim=1).mean().item()
    assert expected_maximum(64) == pytest.approx(drawn, abs=0.02)


def test_work_of_an_image_is_counted_by_passes() -> None:
    # 3 steps x 2 branches and a decode
    assert WORK.rollout_flops == 11
    # 2 trained steps x (policy, reference twice, backward); off the policy the branch without text too
    assert (WORK.update_flops(is_on_policy=True), WORK.update_flops(is_on_policy=False)) == (10, 12)
    assert WORK.image_flops == 22


def test_what_is_lost_is_computed_apart() -> None:
    free = replace(SIMPLE, call_seconds=1e-30, ring_hop_seconds=1e-30, node_bytes_per_second=1e30)
    free = replace(free, tree_hop_seconds=1e-30, network_hop_seconds=1e-30, network_bytes_per_second=1e30)
    even = predict(WORK, 4, 16, free, NOTHING_BUT_WORK)
    assert (even.even_seconds, even.uneven_seconds, even.filled_seconds) == (4 * 22, 0, 0)
    assert even.efficiency == pytest.approx(1)
    # 22 images: two steps of 11 leave some rank 3 in each, and 6 in all, which run 3 at a time
    odd = predict(WORK, 4, 22, free, NOTHING_BUT_WORK)
    assert odd.even_seconds == 22 / 4 * 22
    assert odd.even_seconds + odd.uneven_seconds == 6 * 11 + 3 * 10 + 3 * 12
    assert odd.filled_seconds == 0
    assert odd.efficiency == pytest.approx(121 / 132)
    # two steps of 17 leave some rank 5 in each, and 9 in all, which run 3 at a time: one is filled up in each update
    filled = predict(WORK, 4, 34, free, NOTHING_BUT_WORK)
    assert filled.even_seconds + filled.uneven_seconds == 9 * 11 + 5 * 10 + 5 * 12
    assert filled.filled_seconds == 1 * 10 + 1 * 12
    late = predict(WORK, 2, 16, free, replace(NOTHING_BUT_WORK, variation=0.1))
    assert late.slowest_seconds == pytest.approx(8 * 22 * 0.1 / math.sqrt(math.pi))
    told_seconds = predict(WORK, 4, 16, SIMPLE, NOTHING_BUT_WORK).exchange_seconds
    gathers = sum(SIMPLE.seconds("all_gather", one.payload_bytes, 4) for one in told(WORK, 4, 16)[:-1])
    assert told_seconds == pytest.approx(gathers + 2 * SIMPLE.seconds("all_reduce", 40, 4))
    with pytest.raises(ValueError, match="7 images in 2 optimizer steps are less than one a step for each of 4 GPUs"):
        predict(WORK, 4, 7, SIMPLE, NOTHING_BUT_WORK)


def test_spread_weights_wait_for_what_is_longer_than_the_pass_it_hides_behind() -> None:
    units = (((8,),), ((16,),))
    work = replace(WORK, units=units, branches=1, has_reference=False, optimizer_steps=1, num_weights=24)
    slow = Speed(flops_per_second=1e-6, variation=0.0)
    gathers = [SIMPLE.seconds("all_gather", 2 * n, 4) for n in (8, 16)]
    scatters = [SIMPLE.seconds("reduce_scatter", 4 * n, 4) for n in (8, 16)]
    always = sum(SIMPLE.seconds(one.kind, one.payload_bytes, 4) for one in told(work, 4, 16))
    # all before the rollout; of each of 2 passes the first gather and the last scatter
    hidden = sum(gathers) + 2 * (gathers[-1] + gathers[0] + scatters[-1])
    assert predict(work, 4, 16, SIMPLE, slow).exchange_seconds == pytest.approx(always + hidden)
    fast = Speed(flops_per_second=1e30, variation=0.0)
    bare = hidden + 2 * (2 * sum(gathers) + sum(scatters))
    assert predict(work, 4, 16, SIMPLE, fast).exchange_seconds == pytest.approx(always + bare)


def test_a_last_micro_batch_is_filled_up_unless_it_is_the_only_one() -> None:
    assert [rows_computed(rows, 4) for rows in (1, 4, 5, 8, 9)] == [1, 4, 8, 8, 12]


def test_more_gpus_are_never_more_efficient_at_as_many_images_each() -> None:
    rows = predictions([WORK], Cluster(), Speed())
    weak = [row.prediction.efficiency for row in rows if row.scaling == "weak" and row.prediction]
    assert len(weak) == 8
    assert weak == sorted(weak, reverse=True)
    (refused,) = (row for row in rows if row.prediction is None)
    assert (refused.scaling, refused.num_gpus) == ("strong", 1024)


def test_sizes_of_published_networks_are_theirs(published: list[Workload]) -> None:
    adapters, full, flux = published
    assert (adapters.num_weights, flux.num_weights) == (18_776_064, 179_306_496)
    assert sum(filled_up(unit, 1) for unit in full.units) == full.num_weights == 2_243_171_520
    # as many as flow_grpo's floor has: 5.69 images at 800 TFLOP/s
    assert 800e12 / adapters.image_flops == pytest.approx(5.69, rel=0.01)
    linear = nn.Linear(4, 6, device="meta")
    network = nn.ModuleDict({"attn": nn.ModuleDict({"to_q": linear})})
    assert num_trained(network, build(load_config("train", ["adaptation.rank=2"]).adaptation)) == 2 * (4 + 6)


def test_timed_runs_are_compared_a_rank_with_the_first_of_their_round() -> None:
    first, weak, strong = cases_of([2, 8], prompts=6)
    assert (first, weak, strong) == (Case("first", 2, 6), Case("weak", 8, 24), Case("strong", 8, 6))
    rounds = [
        {first: Timed(36, 10.0, 0.0), weak: Timed(144, 36.0, 0.0)},
        {first: Timed(36, 20.0, 0.0), weak: Timed(144, 80.0, 0.0)},
    ]
    assert efficiencies(weak, first, rounds) == [0.9, 1.0]
