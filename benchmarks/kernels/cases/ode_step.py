"""One deterministic step, guidance included."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.kernels.case import Case, Inputs, Outputs, Run, Scale, Size, Variant, compiled
from benchmarks.kernels.cases.step import SD3_512, SD3_1024, branches, label, make_step, plain_mean, velocity
from fastgrpo_kernels import ode_step


def cases(scale: Scale) -> list[Case]:
    large = scale(Size(64, SD3_1024))
    return [
        _case(scale(Size(9, SD3_512)), torch.bfloat16, guided=True),
        _case(large, torch.bfloat16),
        _case(large, torch.bfloat16, guided=True),
        _case(large, torch.float32, guided=True),
    ]


def _eager(x: Tensor, v: Tensor, v_uncond: Tensor | None, c_x_B: Tensor, c_v_B: Tensor) -> Tensor:
    return plain_mean(x, v, v_uncond, c_x_B, c_v_B).to(x.dtype)


def _exact(x: Tensor, v: Tensor, v_uncond: Tensor | None, c_x_B: Tensor, c_v_B: Tensor) -> Tensor:
    """Guidance in float32, as the operator's."""
    return _eager(x, v.float(), None if v_uncond is None else v_uncond.float(), c_x_B, c_v_B)


def _case(size: Size, dtype: torch.dtype, *, guided: bool = False) -> Case:
    def triton(inputs: Inputs) -> Outputs:
        return (ode_step(inputs["x"], velocity(inputs, guided), inputs["c_x"], inputs["c_v"]),)

    def plain(function: Callable[..., Tensor]) -> Run:
        return lambda inputs: (function(inputs["x"], *branches(inputs, guided), inputs["c_x"], inputs["c_v"]),)

    # a guided velocity in the dtype of the model is rounded
    tolerance = 0.01 if guided else None
    return Case(
        op="ode_step",
        label=label(size, dtype, guided=guided),
        make=make_step(size, dtype),
        variants={
            "triton": Variant(triton),
            "eager": Variant(plain(_eager), tolerance=tolerance),
            "compile": Variant(plain(compiled(_eager)), tolerance=tolerance),
        },
        expected=plain(_exact),
        num_elements=size.num_elements,
        # x, v, the unconditional v; x_next
        read_bytes=size.num_elements * dtype.itemsize * (2 + guided),
        written_bytes=size.num_elements * dtype.itemsize,
    )
