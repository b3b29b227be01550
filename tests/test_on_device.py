"""What the host has decided on reaches a GPU without the host's waiting for it."""

import ast
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastgrpo.on_device import on_device

ROOT = Path(__file__).parents[1]
# the rows of conditions are tensors that are pinned there as they are read
# text encoders wait for what is not pinned: once a run, or they pin it
PINS_ITSELF = {"fastgrpo/on_device.py", "fastgrpo/models/text_encoders.py"}


def test_values_keep_their_type_and_shape() -> None:
    assert on_device((3, 1), torch.device("cpu")).tolist() == [3, 1]
    assert on_device([3, 1], torch.device("cpu")).dtype == torch.int64
    table = torch.tensor([[0.1], [0.2]], dtype=torch.float64)
    assert torch.equal(on_device(table, torch.device("cpu")), table)


def test_a_gpu_is_sent_pinned_memory_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    def pin_memory(tensor: Tensor) -> Tensor:
        calls.append("pinned")
        return tensor

    def to(tensor: Tensor, *where: object, **how: object) -> Tensor:
        calls.append((where, how))
        return tensor

    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(Tensor, "to", to)
    device = torch.device("cuda", 1)
    assert on_device([5], device).tolist() == [5]
    assert calls == ["pinned", ((device,), {"non_blocking": True})]


def test_nothing_else_queues_a_copy_that_may_not_be_from_pinned_memory() -> None:
    """``x.to(device, non_blocking=True)`` of pageable memory promises what CUDA need not keep."""
    found = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "fastgrpo").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "to"
        and any(keyword.arg == "non_blocking" for keyword in node.keywords)
    }
    assert found == PINS_ITSELF
