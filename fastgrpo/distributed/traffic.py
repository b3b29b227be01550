"""What one rank tells the others: every collective by stage, kind and shapes, its bytes, and its bytes on the wire.

Counted where PyTorch dispatches collectives, so those of FSDP, of DTensor, of backward passes and of pickled objects
(an all_gather of lengths and one of bytes) are seen as what they are, whoever called them.

A collective of W ranks has a payload of S bytes: the whole that is reduced or copied, or the parts of all ranks
together where each has a part.  Through the busiest rank's link, in one direction, go at least

    all_reduce                                        2 S (W - 1) / W   (reduce_scatter, then all_gather)
    all_gather, reduce_scatter, all_to_all              S (W - 1) / W
    gather, scatter                                     S (W - 1) / W   (at the rank that has the whole)
    broadcast, reduce                                   S               (from rank to rank in small pieces)
    send, recv                                          S

which is what rings need.  Source: Patarasu and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of
workstations" (2009).
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastgrpo.profiling.timing import running_stage

_NAMESPACES = ("c10d", "_c10d_functional", "_dtensor")
_SILENT = {"check_for_nan", "wait_tensor", "_wrap_tensor_autograd"}
# operator -> kind, and the place of the argument with this rank's part, or with the whole where it has that
_OPERATORS = {
    "c10d::allreduce_": ("all_reduce", 0),
    "c10d::allreduce_coalesced_": ("all_reduce", 0),
    "c10d::_allgather_base_": ("all_gather", 1),
    "c10d::allgather_": ("all_gather", 1),
    "c10d::allgather_coalesced_": ("all_gather", 1),
    "c10d::allgather_into_tensor_coalesced_": ("all_gather", 1),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", 1),
    "c10d::reduce_scatter_": ("reduce_scatter", 1),
    "c10d::reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "c10d::alltoall_": ("all_to_all", 1),
    "c10d::alltoall_base_": ("all_to_all", 1),
    "c10d::broadcast_": ("broadcast", 0),
    "c10d::reduce_": ("reduce", 0),
    "c10d::gather_": ("gather", 1),
    "c10d::scatter_": ("scatter", 0),
    "c10d::send": ("send", 0),
    "c10d::recv_": ("recv", 0),
    "c10d::recv_any_source_": ("recv", 0),
    "c10d::barrier": ("barrier", 0),
    "c10d::monitored_barrier_": ("barrier", 0),
    "_c10d_functional::all_reduce": ("all_reduce", 0),
    "_c10d_functional::all_reduce_": ("all_reduce", 0),
    "_c10d_functional::all_reduce_coalesced": ("all_reduce", 0),
    "_c10d_functional::all_reduce_coalesced_": ("all_reduce", 0),
    "_c10d_functional::all_gather_into_tensor": ("all_gather", 0),
    "_c10d_functional::all_gather_into_tensor_out": ("all_gather", 0),
    "_c10d_functional::all_gather_into_tensor_coalesced": ("all_gather", 0),
    "_c10d_functional::reduce_scatter_tensor": ("reduce_scatter", 0),
    "_c10d_functional::reduce_scatter_tensor_out": ("reduce_scatter", 0),
    "_c10d_functional::reduce_scatter_tensor_coalesced": ("reduce_scatter", 0),
    "_c10d_functional::all_to_all_single": ("all_to_all", 0),
    "_c10d_functional::broadcast": ("broadcast", 0),
    "_c10d_functional::broadcast_": ("broadcast", 0),
    "_c10d_functional::isend": ("send", 0),
    "_c10d_functional::irecv": ("recv", 0),
    "_dtensor::shard_dim_alltoall": ("all_to_all", 0),
}
# of these the argument is a part of the payload
_IN_PARTS = {"all_gather", "gather", "scatter"}
_NUM_RINGS = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1, "gather": 1, "scatter": 1}


@dataclass(frozen=True)
class Collective:
    """One call of ``num_ranks``.  ``shapes`` are of this rank's part, of whole tensors where it has those."""

    stage: str
    kind: str
    num_ranks: int
    dtype: str
    shapes: tuple[tuple[int, ...], ...]
    payload_bytes: int

    @property
    def wire_bytes(self) -> float:
        """In one direction, through the busiest rank's link."""
        return wire_bytes(self.kind, self.payload_bytes, self.num_ranks)


class Traffic(TorchDispatchMode):
    """``with Traffic() as traffic:`` counts what this thread and its backward passes tell other ranks."""

    def __init__(self) -> None:
        super().__init__()
        self._counts: Counter[Collective] = Counter()

    def take(self) -> Counter[Collective]:
        """How often each collective was called since the last time that this was asked."""
        taken, self._counts = self._counts, Counter()
        return taken

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        # otherwise compiled blocks would run eagerly while we look; collectives are outside of them
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # a DTensor's operators show their collectives once they are those of its local tensors
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        kwargs = kwargs or {}
        if func.namespace in _NAMESPACES and func._opname not in _SILENT:
            self._counts[_collective(func, args, kwargs)] += 1
        return func(*args, **kwargs)


def wire_bytes(kind: str, payload_bytes: int, num_ranks: int) -> float:
    """Bytes of a payload that pass the busiest rank's link in one direction; 0 for a rank on its own."""
    if num_ranks == 1 or kind == "barrier":
        return 0.0
    return payload_bytes * _NUM_RINGS[kind] * (num_ranks - 1) / num_ranks if kind in _NUM_RINGS else payload_bytes


def _collective(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Collective:
    name = f"{func.namespace}::{func._opname}"
    if name not in _OPERATORS:
        raise NotImplementedError(f"{name} moves bytes that nobody counts; add it to fastgrpo/distributed/traffic.py")
    kind, place = _OPERATORS[name]
    tensors = list(_tensors(args[place]))
    num_ranks = _num_ranks(func, args, kwargs)
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return Collective(
        running_stage(),
        kind,
        num_ranks,
        "+".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})),
        tuple(tuple(tensor.shape) for tensor in tensors),
        0 if kind == "barrier" else num_bytes * (num_ranks if kind in _IN_PARTS else 1),
    )


def _tensors(argument: Any) -> Iterator[Tensor]:
    if isinstance(argument, Tensor):
        yield argument
    else:
        for part in argument:
            yield from _tensors(part)


def _num_ranks(func: Any, args: Any, kwargs: Mapping[str, Any]) -> int:
    names = [argument.name for argument in func._schema.arguments]
    named = dict(zip(names, args, strict=False)) | dict(kwargs)
    group: Any = named["group_name"] if "group_name" in named else named["process_group"]
    if isinstance(group, str):
        return dist.distributed_c10d._resolve_process_group(dist.distributed_c10d.GroupName(group)).size()
    return (group if isinstance(group, dist.ProcessGroup) else dist.ProcessGroup.unbox(group)).size()
