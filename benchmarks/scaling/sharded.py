"""What ranks tell each other where all weights are trained and spread over them, by FSDP2's rules.

A unit is what is gathered at a time: a layer that makes modulations, the rest of a block, the rest of the network.

    a pass forward     an all-gather of each unit, in the type that the model computes in
    a pass backward    the same again, and a reduce-scatter of each unit's gradient in float32
    an optimizer step  an all-reduce of the norms of all weights, in float32
    nodes that copy    with its last pass backward an all-reduce of each rank's part over the nodes, in float32

Each weight is cut along its first dimension, which is filled up to a multiple of the number W of ranks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from benchmarks.scaling.exchanges import FLOAT32, Exchange

Shape = tuple[int, ...]
# the shapes of its weights
Unit = tuple[Shape, ...]


@dataclass(frozen=True, kw_only=True)
class Passes:
    """How often each rank runs the network in an iteration; ``rollout`` is 0 where weights are gathered for it.

    gathered: how often all weights are gathered at once, by stage.
    """

    gathered: dict[str, int]
    rollout: int
    policy: int
    backward: int
    reference: int
    optimizer_steps: int


def of_shards(
    units: Sequence[Unit], num_ranks: int, passes: Passes, compute_bytes: int, *, over_nodes: bool = False
) -> list[Exchange]:
    """Of an iteration; ``compute_bytes`` are those of a number in the type that the model computes in.

    ``num_ranks`` share the weights; ``over_nodes`` says that these are of one node, and that other nodes have copies.
    """
    found: list[Exchange] = []
    for unit in units:
        numbers = filled_up(unit, num_ranks)
        gathers = {
            **passes.gathered,
            "rollout": passes.gathered.get("rollout", 0) + passes.rollout,
            "update": passes.policy + passes.backward + passes.reference,
        }
        for stage, calls in gathers.items():
            if calls:
                found.append(Exchange("weights", stage, "all_gather", numbers * compute_bytes, calls))
        found.append(Exchange("gradients", "update", "reduce_scatter", numbers * FLOAT32, passes.backward))
        if over_nodes:
            part = numbers // num_ranks * FLOAT32
            found.append(Exchange("gradients over nodes", "update", "all_reduce", part, passes.optimizer_steps))
    num_weights = sum(map(len, units))
    return [*found, Exchange("norms", "update", "all_reduce", num_weights * FLOAT32, passes.optimizer_steps)]


def filled_up(unit: Unit, num_ranks: int) -> int:
    """Numbers of a unit, each weight filled up to equal parts for all ranks."""
    return sum(num_ranks * -(-shape[0] // num_ranks) * math.prod(shape[1:]) for shape in unit)


def units_of(transformer: nn.Module) -> list[Unit]:
    """The units of a network, by the rule above."""
    found: list[Unit] = []
    seen: set[int] = set()

    def add(module: nn.Module) -> None:
        weights = [weight for weight in module.parameters() if id(weight) not in seen]
        seen.update(map(id, weights))
        found.append(tuple(tuple(weight.shape) for weight in weights))

    for child in transformer.children():
        for block in child if isinstance(child, nn.ModuleList) else ():
            for part in block.children():
                if isinstance(linear := getattr(part, "linear", None), nn.Linear):
                    add(linear)
            add(block)
    add(transformer)
    return found
