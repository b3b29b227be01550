"""A transformer whose weights are spread over the ranks of a process group, by FSDP2 (``fully_shard``).

Each rank holds 1 / W of every weight in float32, and of its gradient.  A block's weights are gathered, in the type that
the model computes in, when the block runs and when its gradient is taken; its gradient is then summed over the ranks
and each keeps its part:

    forward, backward   all-gather of each block            param_dtype
    backward            reduce-scatter of each gradient     reduce_dtype, a sum and not a mean
    the last backward   all-reduce of its parts over nodes  reduce_dtype, where each node has a copy

The linear layers that make modulations run before their block does, so each is gathered by itself.
Letters: W ranks, N nodes.  arXiv:2304.11277.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from fastgrpo.models.blocks.layout import blocks_of, modulators

Result = TypeVar("Result")


def over(module: Any, function: Callable[..., Result], *inputs: Any) -> Result:
    """``function(module, *inputs)``; where the module's weights are spread over ranks, they are gathered for it."""
    if isinstance(module, FSDPModule):
        result: Result = module.run_over(function, *inputs)  # type: ignore[attr-defined]
        return result
    return function(module, *inputs)


@dataclass(frozen=True)
class Shards:
    """Spreads transformers over the ranks of a mesh: [W], or [N, W / N] to spread within a node and copy over nodes."""

    mesh: DeviceMesh

    @classmethod
    def over_ranks(cls, group: dist.ProcessGroup | None, device: torch.device, *, within_node: bool) -> "Shards":
        """Of the group's ranks; None makes a group of this process alone.  ValueError if nodes do not divide them."""
        if group is None:
            group = _group_of_one(device)
        if not within_node:
            return cls(DeviceMesh.from_group(group, device.type))
        num_ranks, in_node = group.size(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if num_ranks % in_node or num_ranks != dist.get_world_size():
            raise ValueError(
                f"adaptation.shard_over=node needs as many training ranks on every node, got {num_ranks} of "
                f"{dist.get_world_size()} ranks, {in_node} a node; use adaptation.shard_over=all"
            )
        return cls(init_device_mesh(device.type, (num_ranks // in_node, in_node), mesh_dim_names=("nodes", "ranks")))

    def __call__(self, transformer: nn.Module, *, compute_dtype: torch.dtype) -> None:
        """Spread it in place.  Weights that are trained are kept in float32, or in float64 if they are."""
        # the type of all trained weights, so that a sum of gradients loses nothing
        exact = torch.promote_types(compute_dtype, torch.float32)
        policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=exact, cast_forward_inputs=False)
        for unit in _units(transformer):
            # unit by unit, so that never the whole is in memory in both types
            for weight in unit.parameters():
                if weight.requires_grad and not isinstance(weight, DTensor):
                    weight.data = weight.data.to(exact)
            # always freed after forward: a copy that is kept would miss the next optimizer step
            fully_shard(unit, mesh=self.mesh, mp_policy=policy, reshard_after_forward=True)
            unit.run_over = _run_over.__get__(unit)  # type: ignore[operator, assignment]
            register_fsdp_forward_method(unit, "run_over")
            assert isinstance(unit, FSDPModule)
            unit.set_gradient_divide_factor(1.0)
            # NCCL's other sums multiply by the factor first, and gloo has none of them
            unit.set_force_sum_reduction_for_comms(True)


@contextmanager
def gathered(transformer: nn.Module) -> Iterator[None]:
    """Inside, this rank has all weights, which must not change, and a forward pass waits for nobody."""
    units = [module for module in transformer.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(True, recurse=False)
            unit.reshard()


@contextmanager
def summed_within_nodes(transformer: nn.Module) -> Iterator[None]:
    """Inside, gradients of weights that nodes copy are added up by each node; the next pass outside sums them all."""
    units = [module for module in transformer.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_requires_all_reduce(False, recurse=False)
    try:
        yield
    finally:
        for unit in units:
            unit.set_requires_all_reduce(True, recurse=False)


def whole(weight: Tensor) -> Tensor:
    """All of a weight, on every rank of its mesh, all of which must ask for it."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def _units(transformer: nn.Module) -> Iterator[nn.Module]:
    """What is gathered together, the innermost first: layers that make modulations, the rest of a block, the rest."""
    for _, block in blocks_of(transformer):
        yield from modulators(block)
        yield block
    yield transformer


def _run_over(module: nn.Module, function: Callable[..., Result], *inputs: Any) -> Result:
    return function(module, *inputs)


def _group_of_one(device: torch.device) -> dist.ProcessGroup:
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    return dist.group.WORLD
