"""Inputs that the kernel tests share.  Kernels run on the GPU where there is one, else in Triton's interpreter.

``pytest -m gpu`` is every test of a kernel on a GPU; on a CPU the same tests run in the interpreter.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastgrpo_kernels import GuidedVelocity, PhiloxNoise

# one process either compiles kernels or interprets them
_KERNEL_DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu)]
if not torch.cuda.is_available():
    _KERNEL_DEVICES.insert(0, pytest.param("cpu", id="interpreter"))


@pytest.fixture(params=_KERNEL_DEVICES)
def kernel_device(request: pytest.FixtureRequest) -> str:
    """Where a Triton launcher is called."""
    return request.param


@pytest.fixture
def make_step() -> Callable[..., dict[str, Any]]:
    """The arguments of `sde_step` by name: coefficients that differ by sample, with guidance or noise to be drawn."""

    def make(
        *shape: int,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        guided: bool = False,
        drawn: bool = False,
    ) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        x, v, noise, v_uncond = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4))
        offsets = {"c_x": 0.8, "c_v": -0.6, "std": 0.1}
        coefficients = {
            name: (torch.rand(shape[0], generator=generator) + offset).to(device) for name, offset in offsets.items()
        }
        ids_B = torch.arange(shape[0], device=device)
        return {
            "x": x,
            "v": GuidedVelocity(v, v_uncond, 4.5) if guided else v,
            "noise": PhiloxNoise(2**40 + 3, 1002, ids_B + 5, 2**32 - 1 - ids_B) if drawn else noise,
            **coefficients,
        }

    return make


@pytest.fixture
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is NaN, so an element that a kernel forgets to write shows."""
    for name in ("empty", "empty_like"):
        allocate = getattr(torch, name)
        monkeypatch.setattr(
            torch, name, lambda *args, _allocate=allocate, **kwargs: _allocate(*args, **kwargs).fill_(math.nan)
        )
