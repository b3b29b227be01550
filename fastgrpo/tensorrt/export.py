"""What every engine starts from: a reward network as a graph of ATen operators, with the batch left open.

The graph is traced on the CPU whatever device will run it, so it is the same graph, and the same cache key, on every
machine and rank.  Letters: B images.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The batches that an engine takes, 1 to ``max_batch``, and the one that its kernels are chosen for."""

    opt_batch: int
    max_batch: int

    def __post_init__(self) -> None:
        # torch.export makes a constant of a dimension that has one size only
        if not 1 <= self.opt_batch <= self.max_batch or self.max_batch < 2:
            raise ValueError(
                f"reward_backend.opt_batch must lie in 1 to max_batch and max_batch be at least 2, got "
                f"{self.opt_batch} and {self.max_batch}"
            )

    def shapes(self, row: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """The smallest, the best and the largest shape of an input whose rows have shape ``row``."""
        return (1, *row), (self.opt_batch, *row), (self.max_batch, *row)


@dataclass(frozen=True)
class Input:
    """One input of a network: dimension 0 is the batch."""

    name: str
    dtype: torch.dtype
    row: tuple[int, ...]


def export(network: nn.Module, examples: tuple[Tensor, ...], max_batch: int) -> ExportedProgram:
    """The network, on the CPU, for batches of 1 to ``max_batch``; ``examples`` are inputs of 2 rows or more."""
    batch = Dim("batch", min=1, max=max_batch)
    with torch.no_grad():
        return torch.export.export(
            network,
            tuple(example[:max_batch].cpu() for example in examples),
            dynamic_shapes=tuple({0: batch} for _ in examples),
        )


def inputs_of(program: ExportedProgram) -> tuple[Input, ...]:
    """The inputs, in the order in which the network is called with them."""
    values = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    return tuple(Input(name, values[name].dtype, tuple(values[name].shape[1:])) for name in _names(program))


def graph_digest(program: ExportedProgram) -> str:
    """SHA-256 of the graph's code and of the constants in it; its weights have a fingerprint of their own."""
    digest = hashlib.sha256(program.graph_module.code.encode())
    for name, constant in sorted(program.constants.items()):
        if isinstance(constant, Tensor):
            digest.update(f"{name} {constant.dtype} {tuple(constant.shape)} ".encode())
            digest.update(constant.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_onnx(program: ExportedProgram, path: Path) -> None:
    """Write ``path`` and, beside it, its weights: a file of its own has room for more than protobuf's 2 GiB."""
    onnx_program = torch.onnx.export(program, dynamo=True, verbose=False)
    assert onnx_program is not None
    onnx_program.save(path, external_data=True)


def _names(program: ExportedProgram) -> tuple[str, ...]:
    return tuple(str(name) for name in program.graph_signature.user_inputs)
