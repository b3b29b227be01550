"""Mistakes that ranks could make, each a context around a run on two: a comparison with one rank must see them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastgrpo import trainer
from fastgrpo.distributed.world import World
from fastgrpo.replay import Term
from fastgrpo.step_replay import StepReplay
from fastgrpo.types import Samples


@contextmanager
def a_lost_gradient(world: World) -> Iterator[None]:
    """Of one rank, in one optimizer step."""
    add, steps = World.sum_, []

    def add_nothing(self: World, tensors: list[Tensor], what: str) -> None:
        steps.append(what)
        if world.rank == 1 and len(steps) == 1:
            torch._foreach_zero_(tensors)
        add(self, tensors, what)

    with mock.patch.object(World, "sum_", add_nothing):
        yield
    assert steps[0] == "gradients"


@contextmanager
def too_large_a_sum(world: World) -> Iterator[None]:
    """By 0.1%: of terms that are one too few, where a thousand are many."""
    add = World.sum_

    def add_more(self: World, tensors: list[Tensor], what: str) -> None:
        add(self, tensors, what)
        torch._foreach_mul_(tensors, 1.001)

    with mock.patch.object(World, "sum_", add_more):
        yield


@contextmanager
def advantages_of_another(world: World) -> Iterator[None]:
    """One rank learns from those of the other's samples."""

    def of_first(samples: Samples, values_PG: Tensor) -> Tensor:
        return values_PG.flatten()[: len(samples)]

    with mock.patch.object(trainer, "_of", of_first if world.rank == 1 else trainer._of):
        yield


@contextmanager
def a_skipped_batch(world: World) -> Iterator[None]:
    """One rank leaves out one step of one micro-batch."""
    term, batches = StepReplay.term, []

    def without_one_gradient(self: StepReplay, *arguments: Any) -> Term:
        found = term(self, *arguments)
        batches.append(1)
        if world.rank == 1 and len(batches) == 2:
            return replace(found, loss=0.0 * found.loss + found.loss.detach())
        return found

    with mock.patch.object(StepReplay, "term", without_one_gradient):
        yield
    assert len(batches) > 2


@contextmanager
def rewards_in_another_order(world: World) -> Iterator[None]:
    """Gathered so on all ranks, each of which has its neighbour's."""
    gather = World.gather

    def gather_turned(self: World, *arguments: Any) -> Tensor:
        values_BC = gather(self, *arguments)
        return values_BC.roll(1, dims=0) if arguments[-1] == "rewards" else values_BC

    with mock.patch.object(World, "gather", gather_turned):
        yield
