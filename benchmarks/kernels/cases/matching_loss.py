"""The errors of losses on the forward process, alone and with the gradient: an update's part."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.kernels.case import Case, Inputs, Outputs, Run, Scale, Size, Variant, compiled
from benchmarks.kernels.cases.forward import make_forward
from benchmarks.kernels.cases.step import SD3_512, SD3_1024, label, with_gradient
from fastgrpo_kernels import matching_loss

_BETA = 0.7
# of the sums over elements, of which the errors are means, in the order of `MatchingErrors`
_GRADIENTS = (1.0, 0.5, 0.0, 0.0, 0.0, 0.1, 0.04)


def cases(scale: Scale) -> list[Case]:
    large = scale(Size(64, SD3_1024))
    return [
        _case(scale(Size(9, SD3_512)), torch.bfloat16, old=True, reference=True, drawn=True, backward=True),
        _case(large, torch.bfloat16),
        _case(large, torch.bfloat16, old=True),
        _case(large, torch.bfloat16, old=True, reference=True),
        _case(large, torch.bfloat16, drawn=True, backward=True),
        _case(large, torch.bfloat16, old=True, backward=True),
        _case(large, torch.bfloat16, old=True, reference=True, drawn=True, backward=True),
        _case(large, torch.float32, old=True, reference=True, backward=True),
    ]


def _eager(v: Tensor, v_old: Tensor | None, x_0: Tensor, noise: Tensor, v_reference: Tensor | None) -> Outputs:
    v, target = v.float(), noise - x_0
    v_old = v.detach() if v_old is None else v_old.float()
    plus, minus = v_old + _BETA * (v - v_old) - target, v_old - _BETA * (v - v_old) - target
    squares = [_mean(error.square()) for error in (plus, minus, v_old - target)]
    absolute = [_mean(error.detach().abs()) for error in (plus, minus)]
    drift = _mean((v - v_old).square())
    reference = torch.zeros_like(drift) if v_reference is None else _mean((v - v_reference.float()).square())
    return *squares, *absolute, drift, reference


def _mean(error: Tensor) -> Tensor:
    return error.flatten(1).mean(dim=1)


def _case(
    size: Size, dtype: torch.dtype, *, old: bool = False, reference: bool = False, drawn: bool = False,
    backward: bool = False,
) -> Case:  # fmt: skip
    """Velocities in the dtype of the model, a float32 image; plain PyTorch reads the noise that the operator draws."""

    def velocities(inputs: Inputs) -> tuple[Tensor | None, Tensor | None]:
        return inputs["v_old"] if old else None, inputs["v_reference"] if reference else None

    def triton(inputs: Inputs) -> Outputs:
        v_old, v_reference = velocities(inputs)
        noise = inputs["philox" if drawn else "noise"]
        return matching_loss(inputs["v"], v_old, inputs["x_0"], noise, beta=_BETA, v_reference=v_reference)

    def plain(function: Callable[..., Outputs]) -> Run:
        def run(inputs: Inputs) -> Outputs:
            v_old, v_reference = velocities(inputs)
            return function(inputs["v"], v_old, inputs["x_0"], inputs["noise"], v_reference)

        return run

    runs = {"triton": triton, "eager": plain(_eager), "compile": plain(compiled(_eager))}
    if backward:
        runs = {name: with_gradient(run, _GRADIENTS) for name, run in runs.items()}
    # velocities; x_0 and a noise that is given, in float32; the backward pass reads them once more
    read_bytes = size.num_elements * (dtype.itemsize * (1 + old + reference) + 4 * (1 + (not drawn)))
    return Case(
        op="matching_loss",
        label=label(size, dtype, old=old, reference=reference, drawn=drawn, backward=backward),
        make=make_forward(size, dtype),
        variants={name: Variant(run) for name, run in runs.items()},
        expected=runs["eager"],
        num_elements=size.num_elements,
        read_bytes=read_bytes * (1 + backward),
        written_bytes=size.num_elements * dtype.itemsize * backward,
        limit="drawing" if drawn else "memory",
    )
