"""A forward pass brings to its device nothing but by ``on_device``, which does not wait, and once a shape.

The device is meta, which no copy comes back from: on a GPU each would be a wait, and no CUDA graph could be captured.
"""

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastgrpo.composing import config_groups
from fastgrpo.config import load_config
from fastgrpo.models.adaptation import FullFineTuning
from fastgrpo.models.pipeline_model import PipelineModel
from fastgrpo.on_device import on_device
from fastgrpo.pieces import build_partial
from fastgrpo_kernels import combined

MINIATURES = [name for name in config_groups("train")["model"] if name.endswith("_miniature")]


class Copies(TorchDispatchMode):
    """Operations that bring tensors of the host to the device: ``proper`` ones, by ``on_device``, and others.

    What torch.tensor makes there of a list it does not see.
    """

    def __init__(self) -> None:
        super().__init__()
        self.proper: list[str] = []
        self.others: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        devices = {part.device.type for part in tree_leaves((args, kwargs, result)) if _is_copied(part)}
        if devices == {"cpu", "meta"}:
            (self.proper if any(map(_is_on_device, _callers())) else self.others).append(func.name())
        return result


def _is_copied(part: Any) -> bool:
    # a number is an argument of the kernel
    return isinstance(part, Tensor) and (part.dim() > 0 or part.device.type != "cpu")


def _callers() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_on_device(frame: FrameType) -> bool:
    return frame.f_code is on_device.__code__


@pytest.mark.parametrize("is_sampling", [False, True], ids=["gradient", "sampling"])
@pytest.mark.parametrize("name", MINIATURES)
def test_a_forward_pass_copies_from_the_host_once_a_shape_and_never_waits(name: str, is_sampling: bool) -> None:
    config = load_config("train", [f"model={name}", "model.resolution=[64,128]", "model.guidance_scale=1"])
    model: PipelineModel = build_partial(config.model, "adaptation")(adaptation=FullFineTuning())
    conditions = model.encode(["a red circle", "two blue squares left of a green triangle"]).to("meta")
    model.transformer.to("meta")
    x = torch.zeros(2, *model.latent_shape, device="meta")
    with model.sampling() if is_sampling else nullcontext():
        with Copies() as first:
            combined(model.velocity(x, 0.7, conditions))
        with Copies() as second:
            v = combined(model.velocity(x, 0.7, conditions))
    assert v.device.type == "meta"
    assert v.shape == x.shape
    assert first.others == []
    assert second.proper == second.others == []


def test_the_watch_sees_what_is_copied() -> None:
    host, there = torch.zeros(2, 2), torch.zeros(2, 2, device="meta")
    with Copies() as seen:
        on_device(host, "meta")
        on_device([1, 2], "meta")
        there + 1.0
        there + torch.zeros(())
        there[torch.arange(2, device="meta")]
    assert len(seen.proper) == 2
    assert seen.others == []
    with Copies() as seen:
        host.to("meta")
        there[torch.arange(2)]
    assert len(seen.others) == 2
