"""The log_prob of a stored step and its KL to the reference policy, alone and with the gradient: an update's part."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.kernels.case import Case, Inputs, Outputs, Run, Scale, Size, Variant, compiled
from benchmarks.kernels.cases.step import (
    SD3_512,
    SD3_1024,
    branches,
    coefficients,
    label,
    make_step,
    per_sample,
    plain_log_prob,
    plain_mean,
    plain_velocity,
    velocity,
    with_gradient,
)
from fastgrpo_kernels import sde_log_prob

# of the sums over elements, of which log_prob and KL are means; with kl_coef 0.04
_GRADIENTS = (1.0, 0.04)


def cases(scale: Scale) -> list[Case]:
    large = scale(Size(64, SD3_1024))
    return [
        _case(scale(Size(9, SD3_512)), torch.bfloat16, guided=True, kl=True, backward=True),
        _case(large, torch.bfloat16),
        _case(large, torch.bfloat16, kl=True),
        _case(large, torch.bfloat16, guided=True, kl=True),
        _case(large, torch.float32, kl=True),
        _case(large, torch.bfloat16, backward=True),
        _case(large, torch.bfloat16, guided=True, kl=True, backward=True),
        _case(large, torch.float32, kl=True, backward=True),
    ]


def _eager(
    x: Tensor, v: Tensor, v_uncond: Tensor | None, x_next: Tensor, c_x_B: Tensor, c_v_B: Tensor, std_B: Tensor,
    reference: Tensor | None, reference_uncond: Tensor | None, kl_weight_B: Tensor,
) -> Outputs:  # fmt: skip
    difference = x_next.float() - plain_mean(x, v, v_uncond, c_x_B, c_v_B)
    log_prob_B = plain_log_prob(difference, std_B, "gaussian")
    if reference is None:
        return (log_prob_B,)
    shift = plain_velocity(v, v_uncond).float() - plain_velocity(reference, reference_uncond).float()
    mean_square_B = (per_sample(c_v_B, x) * shift).square().flatten(1).mean(dim=1)
    return log_prob_B, kl_weight_B * mean_square_B


def _case(size: Size, dtype: torch.dtype, *, guided: bool = False, kl: bool = False, backward: bool = False) -> Case:
    def triton(inputs: Inputs) -> Outputs:
        reference = {"v_reference": velocity(inputs, guided, "v_reference"), "kl_weight": inputs["kl_weight"]}
        results = sde_log_prob(
            inputs["x"], velocity(inputs, guided), inputs["noise"], *coefficients(inputs), **reference if kl else {}
        )
        return results if kl else results[:1]

    def plain(function: Callable[..., Outputs]) -> Run:
        def run(inputs: Inputs) -> Outputs:
            reference = branches(inputs, guided, "v_reference") if kl else (None, None)
            # a stored x_next is any latent
            step = inputs["x"], *branches(inputs, guided), inputs["noise"], *coefficients(inputs)
            return function(*step, *reference, inputs["kl_weight"])

        return run

    def exact(inputs: Inputs) -> Outputs:
        return plain(_eager)({**inputs, **{name: inputs[name].float() for name in inputs if name.startswith("v")}})

    runs = {"triton": triton, "eager": plain(_eager), "compile": plain(compiled(_eager)), "expected": exact}
    if backward:
        runs = {name: with_gradient(run, _GRADIENTS) for name, run in runs.items()}
    expected = runs.pop("expected")
    # a guided velocity in the dtype of the model is rounded
    tolerance = 0.01 if guided else None
    # x, x_next and the branches of one velocity or two; the backward pass reads them once more
    num_read = (2 + (1 + guided) * (1 + kl)) * (1 + backward)
    return Case(
        op="sde_log_prob",
        label=label(size, dtype, guided=guided, kl=kl, backward=backward),
        make=make_step(size, dtype),
        variants={name: Variant(run, tolerance=None if name == "triton" else tolerance) for name, run in runs.items()},
        expected=expected,
        num_elements=size.num_elements,
        read_bytes=size.num_elements * dtype.itemsize * num_read,
        written_bytes=size.num_elements * dtype.itemsize * backward,
    )
