"""Seconds of an iteration on many GPUs, and the share of them that does useful work: predicted, never timed.

    efficiency = seconds that one GPU would need for all images / (GPUs x seconds of the iteration)

What is lost, each part computed on its own:

    uneven     the rank with most rows sets the pace, in rollout and in each optimizer step, as ``Spread`` cuts them
    filled     the last of several micro-batches is filled up with rows whose results are thrown away
    exchanges  of adapters and rewards all is waited for; FSDP's hide behind the pass that they are for, but for what
               is longer than it, and for the first unit's
    slowest    ranks take differently long for the same work: normally distributed, ``variation`` of the mean, so that
               the slowest of W is late by the expected maximum of W such numbers, before each exchange
"""

import math
from dataclasses import dataclass

import torch

from benchmarks.scaling.cluster import Cluster
from benchmarks.scaling.exchanges import FLOAT32, Exchange, always, of_adapters, shares_of
from benchmarks.scaling.sharded import Passes, filled_up
from benchmarks.scaling.workload import Workload
from fastgrpo.distributed.spread import Spread
from fastgrpo.memory.batches import even

BFLOAT16 = 2


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Of one GPU at its work.  Half of the 798 TFLOP/s that an H100 was measured to reach in a large product: assumed.

    variation: standard deviation of a rank's seconds over their mean: assumed; ranks.jsonl of a run has the real ones.
    """

    flops_per_second: float = 400e12
    variation: float = 0.01


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Seconds of one iteration: of an even share of the work, and what comes on top of it."""

    num_gpus: int
    num_images: int
    even_seconds: float
    uneven_seconds: float
    filled_seconds: float
    exchange_seconds: float
    slowest_seconds: float

    @property
    def seconds(self) -> float:
        return sum((self.even_seconds, *self.lost_seconds))

    @property
    def lost_seconds(self) -> tuple[float, ...]:
        """In the order of the module's list."""
        return self.uneven_seconds, self.filled_seconds, self.exchange_seconds, self.slowest_seconds

    @property
    def efficiency(self) -> float:
        return self.even_seconds / self.seconds


def predict(
    workload: Workload, num_gpus: int, num_images: int, cluster: Cluster, speed: Speed, *, within_node: bool = False
) -> Prediction:
    """Of an iteration of ``num_images``; weights that are spread are so over all GPUs, or ``within_node``.

    ValueError where some GPU would have no image in an optimizer step, which training refuses too.
    """
    rows = Rows.of(workload, num_gpus, num_images)
    pace, computing = (_seconds(workload, one, speed) for one in (rows, rows.filled))
    evenly = num_images * workload.image_flops / num_gpus / speed.flops_per_second
    exchanges = sum(
        one.calls * cluster.seconds(one.kind, one.payload_bytes, num_gpus)
        for one in told(workload, num_gpus, num_images)
    )
    if workload.units:
        exchanges += _waits_for_shards(workload, num_gpus, rows, cluster, speed, within_node)
    return Prediction(
        num_gpus=num_gpus,
        num_images=num_images,
        even_seconds=evenly,
        uneven_seconds=pace - evenly,
        filled_seconds=computing - pace,
        exchange_seconds=exchanges,
        slowest_seconds=computing * speed.variation * expected_maximum(num_gpus),
    )


@dataclass(frozen=True)
class Rows:
    """Of the GPU that has most: in rollout, in each optimizer step, and how many run at a time."""

    in_rollout: int
    in_update: tuple[int, ...]
    micro_batch: int

    @classmethod
    def of(cls, workload: Workload, num_gpus: int, num_images: int) -> "Rows":
        """As training spreads them."""
        if num_images < workload.optimizer_steps * num_gpus:
            raise ValueError(
                f"{num_images} images in {workload.optimizer_steps} optimizer steps are less than one a step for each "
                f"of {num_gpus} GPUs; use fewer GPUs, fewer optimizer steps or more images"
            )
        shares = shares_of(num_images, workload.optimizer_steps)
        in_update = tuple(-(-len(share) // num_gpus) for share in shares)
        # training cuts an optimizer step into micro-batches as even as they divide
        return cls(Spread.of_shares(shares, num_gpus).most, in_update, even(max(in_update), workload.micro_batch))

    @property
    def filled(self) -> "Rows":
        """With those that fill up the last of several micro-batches."""
        in_update = tuple(rows_computed(rows, self.micro_batch) for rows in self.in_update)
        return Rows(rows_computed(self.in_rollout, self.micro_batch), in_update, self.micro_batch)


def passes(workload: Workload, rows: Rows) -> Passes:
    """Of the network whose weights are spread, gathered for the rollout."""
    steps = [workload.trained_steps * math.ceil(most / min(most, rows.micro_batch)) for most in rows.in_update]
    return Passes(
        gathered={"rollout": 1},
        rollout=0,
        policy=sum(steps) + (workload.branches > 1) * sum(steps[1:]),
        backward=sum(steps),
        reference=workload.has_reference * sum(steps),
        optimizer_steps=len(steps),
    )


def told(workload: Workload, num_gpus: int, num_images: int) -> list[Exchange]:
    """The exchanges of an iteration, but for those of shards."""
    shares = shares_of(num_images, workload.optimizer_steps)
    found = always(num_gpus, shares, workload.num_rewards, has_reference=workload.has_reference)
    return found if workload.units else found + of_adapters(workload.num_weights, shares)


def rows_computed(rows: int, micro_batch: int) -> int:
    """Rows that go through the network for ``rows``: the last of several micro-batches is filled up."""
    return rows if rows <= micro_batch else -(-rows // micro_batch) * micro_batch


def expected_maximum(num: int) -> float:
    """Of ``num`` independent numbers of N(0, 1): the integral over x > 0 of 1 - Phi(x)^num - Phi(-x)^num."""
    x = torch.linspace(0, 12, 12_001, dtype=torch.float64)
    above, below = 1 - torch.special.ndtr(x) ** num, torch.special.ndtr(-x) ** num
    return float(torch.trapezoid(above - below, x))


def _seconds(workload: Workload, rows: Rows, speed: Speed) -> float:
    flops = rows.in_rollout * workload.rollout_flops
    flops += sum(most * workload.update_flops(is_on_policy=step == 0) for step, most in enumerate(rows.in_update))
    return flops / speed.flops_per_second


def _waits_for_shards(
    workload: Workload, num_gpus: int, rows: Rows, cluster: Cluster, speed: Speed, within_node: bool
) -> float:
    """Seconds in which the GPU has nothing to do but wait for weights or gradients of other ranks."""
    num_shards = min(num_gpus, cluster.gpus_per_node) if within_node else num_gpus
    num_copies = num_gpus // num_shards
    numbers = [filled_up(unit, num_shards) for unit in workload.units]
    gathers = [cluster.seconds("all_gather", BFLOAT16 * n, num_shards) for n in numbers]
    scatters = [cluster.seconds("reduce_scatter", FLOAT32 * n, num_shards) for n in numbers]
    over_nodes = [cluster.seconds("all_reduce", FLOAT32 * n // num_shards, num_copies, per_node=1) for n in numbers]
    gathered = sum(gathers)

    def waits(images: int, flops: float, exchanged: float, first: float) -> float:
        return first + max(0.0, exchanged - images * flops / speed.flops_per_second)

    # of all units at once there is nothing to hide behind; nodes sum their gradients in the last pass of each step
    total = sum(passes(workload, rows).gathered.values()) * gathered
    for step, most in enumerate(rows.in_update):
        batch = min(most, rows.micro_batch)
        unknown = step > 0 and workload.branches > 1
        forwards = [1, *([1] if unknown else []), *([workload.branches] if workload.has_reference else [])]
        one = sum(waits(batch * n, workload.forward_flops, gathered, gathers[-1]) for n in forwards)
        not_last = gathered + sum(scatters), gathers[0] + scatters[-1]
        last = not_last[0] + sum(over_nodes), not_last[1] + over_nodes[-1]
        num_passes = math.ceil(most / batch) * workload.trained_steps
        total += num_passes * one + (num_passes - 1) * waits(batch, workload.backward_flops, *not_last)
        total += waits(batch, workload.backward_flops, *last)
    return total
