"""Inputs that the kernel tests share.  Kernels run on the GPU where there is one, else in Triton's interpreter.

``pytest -m gpu`` is every test of a kernel on a GPU; on a CPU the same tests run in the interpreter.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor


@pytest.fixture(params=[pytest.param("cpu", id="interpreter"), pytest.param("cuda", marks=pytest.mark.gpu)])
def kernel_device(request: pytest.FixtureRequest) -> str:
    """Where a Triton launcher is called."""
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("kernels are either compiled or interpreted in one process: here there is a GPU to compile for")
    return request.param


@pytest.fixture
def make_step() -> Callable[..., dict[str, Tensor]]:
    """The arguments of `sde_step` by name, in its order: a Gaussian step whose coefficients differ by sample."""

    def make(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        x, v, noise = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
        c_x, c_v, std = (torch.rand(shape[0], generator=generator) + offset for offset in (0.8, -0.6, 0.1))
        step = {"x": x, "v": v, "noise": noise, "c_x_B": c_x, "c_v_B": c_v, "std_B": std}
        step["weight_B"] = 0.5 / std.square()
        step["constant_B"] = -std.log() - 0.5 * math.log(2 * math.pi)
        return {name: value.to(device) for name, value in step.items()}

    return make


@pytest.fixture
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is NaN, so an element that a kernel forgets to write shows."""
    for name in ("empty", "empty_like"):
        allocate = getattr(torch, name)
        monkeypatch.setattr(
            torch, name, lambda *args, _allocate=allocate, **kwargs: _allocate(*args, **kwargs).fill_(math.nan)
        )
