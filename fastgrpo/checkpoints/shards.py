"""Named tensors of a run, each rank's part in safetensors files of its own, read back by any number of ranks.

The parts are planned by torch.distributed.checkpoint, and the files are in its Hugging Face format: safetensors whose
metadata say where in the whole tensor a part begins, and no pickle.  Its reader, and so every tool that uses it, opens
them.  A DTensor is written by the ranks that hold its shards; a plain tensor, which all ranks hold, by one of them.

Each rank plans for itself, since all know the same shapes: collecting the plans on one rank, as
``torch.distributed.checkpoint.save`` does, takes minutes for the millions of shards of hundreds of ranks.
"""

import itertools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.tensor import DTensor, Replicate

# plain tensors are shared out in parts of at least this size: hundreds of ranks need not write a file each for a LoRA
PART_BYTES = 1 << 26


@dataclass(frozen=True)
class Shard:
    """A part of a tensor, in host memory, and the indices at which it begins in the whole."""

    tensor: Tensor
    offsets: list[int]


def own_shards(tensors: Mapping[str, Tensor], rank: int, num_ranks: int) -> dict[str, Shard]:
    """Copies of what this rank is to write, such that all ranks together write everything once.

    All ranks call it with the same names and shapes.  Where a mesh repeats a DTensor, its copies take turns.
    """
    planner = DefaultSavePlanner(flatten_state_dict=False)
    planner.set_up_planner(dict(tensors), is_coordinator=True)
    writers = _writers(tensors, num_ranks)
    turns = {name: turn for turn, name in enumerate(tensors)}
    shards = {}
    for item in planner.create_local_plan().items:
        name, tensor = item.index.fqn, tensors[item.index.fqn]
        is_own = _is_turn(tensor, turns[name], item) if isinstance(tensor, DTensor) else writers[name] == rank
        if is_own:
            part = planner.resolve_data(item)
            assert isinstance(part, Tensor)
            assert item.tensor_data is not None
            # not page-locked: that memory would be rounded up to powers of two and never given back
            copy = torch.empty(part.shape, dtype=part.dtype).copy_(part.detach())
            shards[name] = Shard(copy, list(item.tensor_data.chunk.offsets))
    return shards


def write_shards(path: Path, shards: Mapping[str, Shard]) -> None:
    """One file.  Its bytes are a function of the shards alone."""
    offsets = {name: {"saved_offsets": shard.offsets} for name, shard in shards.items()}
    # one entry only: safetensors writes several in an order that changes from process to process
    metadata = {"DCP_SHARDING_INFO": json.dumps(offsets, sort_keys=True)}
    safetensors.torch.save_file({name: shard.tensor for name, shard in shards.items()}, path, metadata=metadata)


@dataclass(frozen=True)
class StoredTensors:
    """The tensors in the files of a directory, whatever number of ranks wrote them."""

    path: Path

    @cached_property
    def sizes(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Shape and type of each tensor, by name.  ValueError if a part of one is missing."""
        sizes = {}
        for name, stored in self._metadata.state_dict_metadata.items():
            assert isinstance(stored, TensorStorageMetadata)
            # what no file holds would be left as it was in memory
            found = sum(math.prod(chunk.sizes) for chunk in stored.chunks)
            if found != math.prod(stored.size):
                raise ValueError(f"{name} has {found} of {math.prod(stored.size)} elements")
            sizes[name] = stored.size, stored.properties.dtype
        return sizes

    def read(self, names: Iterable[str], places: Mapping[str, DTensor]) -> dict[str, Tensor]:
        """The tensors of these names: sharded as the DTensor of that name in ``places``, otherwise whole on the CPU."""
        tensors: dict[str, Tensor] = {}
        for name in names:
            size, dtype = self.sizes[name]
            place = places.get(name)
            tensors[name] = torch.empty(size, dtype=dtype) if place is None else torch.empty_like(place, dtype=dtype)
        planner = DefaultLoadPlanner(flatten_state_dict=False)
        planner.set_up_planner(tensors, self._metadata, is_coordinator=True)
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        plan = planner.finish_plan(self._reader.prepare_local_plan(planner.create_local_plan()))
        self._reader.read_data(plan, planner).wait()
        return tensors

    @cached_property
    def _metadata(self) -> Metadata:
        return self._reader.read_metadata()

    @cached_property
    def _reader(self) -> HuggingFaceStorageReader:
        return HuggingFaceStorageReader(str(self.path))


def _writers(tensors: Mapping[str, Tensor], num_ranks: int) -> dict[str, int]:
    """Which rank writes each plain tensor: the one that has least to write so far."""
    plain = {name: tensor.nbytes for name, tensor in tensors.items() if not isinstance(tensor, DTensor)}
    num_writers = min(num_ranks, max(1, sum(plain.values()) // PART_BYTES))
    # far apart, so that they are on different nodes
    load = {writer * num_ranks // num_writers: 0 for writer in range(num_writers)}
    writers = {}
    for name, size in plain.items():
        writers[name] = min(load, key=load.__getitem__)
        load[writers[name]] += size
    return writers


def _is_turn(tensor: DTensor, turn: int, item: WriteItem) -> bool:
    """Whether this rank writes its shard: where the mesh repeats it, one of those that hold it does."""
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    assert item.tensor_data is not None
    repeated = [dim for dim, placement in enumerate(tensor.placements) if isinstance(placement, Replicate)]
    copies = list(itertools.product(*(range(tensor.device_mesh.size(dim)) for dim in repeated)))
    is_turn = copies[turn % len(copies)] == tuple(coordinate[dim] for dim in repeated)
    # where there are more ranks than rows, some hold nothing
    return is_turn and (math.prod(item.tensor_data.chunk.sizes) > 0 or tensor.numel() == 0)
