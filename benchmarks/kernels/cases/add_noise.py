"""The forward process: images' latents, noised to a time."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.kernels.case import Case, Inputs, Outputs, Run, Scale, Size, Variant, compiled
from benchmarks.kernels.cases.forward import make_forward
from benchmarks.kernels.cases.step import SD3_512, SD3_1024, label, per_sample
from fastgrpo_kernels import add_noise


def cases(scale: Scale) -> list[Case]:
    large = scale(Size(64, SD3_1024))
    return [
        _case(scale(Size(9, SD3_512)), torch.bfloat16, drawn=True),
        _case(large, torch.bfloat16),
        _case(large, torch.bfloat16, drawn=True),
        _case(large, torch.float32),
    ]


def _eager(x_0: Tensor, noise: Tensor, t_B: Tensor, dtype: torch.dtype) -> Tensor:
    t = per_sample(t_B, x_0)
    return ((1 - t) * x_0 + t * noise).to(dtype)


def _case(size: Size, dtype: torch.dtype, *, drawn: bool = False) -> Case:
    """A float32 image, noised in the dtype of the model; plain PyTorch reads the noise that the operator draws."""

    def triton(inputs: Inputs) -> Outputs:
        return (add_noise(inputs["x_0"], inputs["philox" if drawn else "noise"], inputs["t"], dtype=dtype),)

    def plain(function: Callable[..., Tensor]) -> Run:
        return lambda inputs: (function(inputs["x_0"], inputs["noise"], inputs["t"], dtype),)

    return Case(
        op="add_noise",
        label=label(size, dtype, drawn=drawn),
        make=make_forward(size, dtype),
        variants={
            "triton": Variant(triton),
            "eager": Variant(plain(_eager)),
            "compile": Variant(plain(compiled(_eager))),
        },
        expected=plain(_eager),
        num_elements=size.num_elements,
        # x_0 and a noise that is given, in float32; x_t
        read_bytes=size.num_elements * 4 * (1 + (not drawn)),
        written_bytes=size.num_elements * dtype.itemsize,
        limit="drawing" if drawn else "memory",
    )
