"""A forward pass replayed from a CUDA graph: one launch in place of thousands, where the GPU waits for the CPU.

    copy the inputs into the graph's own tensors, replay, copy its output out

There is a graph for each set of shapes, since a graph is a list of kernels with fixed sizes and addresses.  Weights are
read where they were at capture: those changed in place, as merged LoRA is, are seen; those replaced are not.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastgrpo.compile.blocks import CompiledBlocks

_is_eager = ContextVar("_is_eager", default=False)
# a first call compiles, and the next ones let libraries choose their algorithms: none of it may happen in a capture
_WARM_UPS = 3


@contextmanager
def eagerly() -> Iterator[None]:
    """Inside, what was compiled and what is a graph runs as the plain function that it was made of."""
    token = _is_eager.set(True)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        _is_eager.reset(token)


@dataclass(frozen=True)
class Capture:
    """The tensors that a captured run reads, the one that it writes, and what runs it."""

    inputs: tuple[Tensor, ...]
    output: Tensor
    replay: Callable[[], object]


@dataclass(frozen=True)
class Graphed:
    """``function`` of tensors alone, captured at the first call with new shapes or types.

    What else it depends on must be what it was at capture: a model that sometimes computes in fp8 has two of these.
    The output is the caller's own.  RuntimeError under gradient, which a graph does not carry.
    """

    function: Callable[..., Tensor]
    capture: Callable[[Callable[..., Tensor], tuple[Tensor, ...]], Capture]
    _captures: dict[Hashable, Capture] = field(default_factory=dict, init=False)

    def __call__(self, *inputs: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError("a CUDA graph has no gradient; call it under torch.no_grad()")
        if _is_eager.get():
            return self.function(*inputs)
        key = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        captured = self._captures.get(key)
        if captured is None:
            captured = self._captures[key] = self.capture(self.function, inputs)
        torch._foreach_copy_(captured.inputs, inputs, non_blocking=True)
        captured.replay()
        # the next replay overwrites it, and graphs of other shapes share its memory
        return captured.output.clone()


@dataclass(frozen=True, kw_only=True)
class GraphedForward(CompiledBlocks):
    """Compiled blocks, and the whole forward pass around them as CUDA graphs; needs a CUDA device."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not torch.cuda.is_available():
            raise ValueError("compile=graphs needs a CUDA device, and torch sees none; use compile=blocks")

    def forward(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        # graphs that run one after another can share their memory, since outputs are copied out
        return Graphed(function, partial(_capture, pool=torch.cuda.graph_pool_handle()))


def _capture(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], pool: Any) -> Capture:
    static = tuple(tensor.clone() for tensor in inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            function(*static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # rewards wait for their stream in threads of their own, which would end a capture in global mode
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        output = function(*static)
    return Capture(static, output, graph.replay)
