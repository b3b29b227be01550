"""Graphs are captured once for each shape and replay what the function computes; captures are faked without a GPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor, nn

from fastgrpo.compile.cuda_graphs import Capture, Graphed, GraphedForward, _capture, eagerly


class FakeGraphs:
    """Captures as CUDA does: fixed tensors in, and a fixed tensor out that every replay overwrites."""

    def __init__(self) -> None:
        self.captured: list[list[tuple[int, ...]]] = []

    def __call__(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Capture:
        static = tuple(torch.empty_like(tensor) for tensor in inputs)
        output = torch.empty_like(function(*inputs))
        self.captured.append([tuple(tensor.shape) for tensor in inputs])
        return Capture(static, output, lambda: output.copy_(function(*static)))


def weighted(weight: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, shift: torch.tanh(x @ weight) + shift


@torch.no_grad()
def test_each_shape_and_type_is_captured_once_and_computes_the_function() -> None:
    graphs, function = FakeGraphs(), weighted(torch.linspace(-1, 1, 9).view(3, 3))
    run = Graphed(function, graphs)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        for batch in (2, 5):
            x, shift = torch.randn(batch, 3, generator=generator), torch.randn(3, generator=generator)
            assert torch.equal(run(x, shift), function(x, shift))
    assert graphs.captured == [[(2, 3), (3,)], [(5, 3), (3,)]]
    run_double = weighted(torch.eye(3, dtype=torch.float64))
    assert Graphed(run_double, graphs)(torch.ones(2, 3).double(), torch.zeros(3)).dtype == torch.float64
    assert len(graphs.captured) == 3


@torch.no_grad()
def test_an_output_is_not_overwritten_by_the_next_call_and_inputs_are_left_alone() -> None:
    run = Graphed(weighted(torch.eye(2)), FakeGraphs())
    x, shift = torch.ones(1, 2), torch.zeros(2)
    first = run(x, shift)
    kept = first.clone()
    run(-x, shift)
    assert torch.equal(first, kept)
    assert torch.equal(x, torch.ones(1, 2))


@torch.no_grad()
def test_weights_that_are_changed_in_place_are_seen() -> None:
    weight = torch.eye(2)
    run, x, shift = Graphed(weighted(weight), FakeGraphs()), torch.ones(1, 2), torch.zeros(2)
    before = run(x, shift)
    weight.mul_(2)
    assert torch.equal(run(x, shift), torch.tanh(2 * x))
    assert torch.equal(before, torch.tanh(x))


@torch.no_grad()
def test_eagerly_nothing_is_captured() -> None:
    graphs, function = FakeGraphs(), weighted(torch.eye(2))
    run, x, shift = Graphed(function, graphs), torch.ones(1, 2), torch.zeros(2)
    with eagerly():
        assert torch.equal(run(x, shift), function(x, shift))
    assert graphs.captured == []
    run(x, shift)
    assert len(graphs.captured) == 1


def test_a_call_under_gradient_raises() -> None:
    with pytest.raises(RuntimeError, match="no gradient"):
        Graphed(weighted(torch.eye(2)), FakeGraphs())(torch.ones(1, 2), torch.zeros(2))


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_asking_for_graphs_without_cuda_raises() -> None:
    with pytest.raises(ValueError, match="compile=graphs needs a CUDA device, and torch sees none; use compile=blocks"):
        GraphedForward()


def test_threads_may_wait_for_their_own_streams_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    # without a GPU: what CUDA is told is all that can be seen
    told: dict[str, object] = {}

    @contextmanager
    def graph(captured: object, **settings: object) -> Iterator[None]:
        told.update(settings)
        yield

    for name in ("Stream", "current_stream", "stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "graph", graph)
    capture = _capture(weighted(torch.eye(2)), (torch.ones(1, 2), torch.zeros(2)), pool="pool")
    assert torch.equal(capture.output, torch.tanh(torch.ones(1, 2)))
    assert told == {"pool": "pool", "capture_error_mode": "thread_local"}


@pytest.mark.gpu
@torch.no_grad()
def test_on_a_gpu_graphed_equals_ungraphed_bitwise(tmp_path: Path) -> None:
    torch.manual_seed(0)
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256)) for _ in range(4)))
    blocks = blocks.to("cuda", torch.bfloat16)
    piece = GraphedForward(cache=str(tmp_path / "kernels"))

    def residual(block: nn.Module, x: Tensor) -> Tensor:
        return x + block(x)

    compiled = piece(residual)

    def forward(x: Tensor) -> Tensor:
        for block in blocks:
            x = compiled(block, x)
        return x

    run = piece.forward(forward)
    for batch in (8, 3, 8):
        x = torch.randn(batch, 77, 256, device="cuda", dtype=torch.bfloat16)
        assert torch.equal(run(x), forward(x))
    for weight in blocks.parameters():
        weight.mul_(1.5)
    x = torch.randn(8, 77, 256, device="cuda", dtype=torch.bfloat16)
    assert torch.equal(run(x), forward(x))
