"""The log-probability of a stored step and its KL: values, gradients, and the kernels."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastgrpo_kernels import sde_log_prob
from fastgrpo_kernels.sde_log_prob import (
    _sde_log_prob_backward_triton,
    _sde_log_prob_triton,
    sde_log_prob_backward_reference,
    sde_log_prob_reference,
)
from tests.kernels.parameters import DEVICES, DTYPES

MakeStep = Callable[..., dict[str, Tensor]]
Arguments = dict[str, Any]
# of a gradient in this dtype; half-precision ones may differ by one rounding
TOLERANCES: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-7},
    torch.float16: {"rtol": 1e-3, "atol": 1e-6},
    torch.bfloat16: {"rtol": 8e-3, "atol": 1e-6},
}
FORWARD_TOLERANCE: dict[str, Any] = {"rtol": 3e-7, "atol": 1e-7}
SHAPES = [(3, 1), (2, 7), (2, 1024), (3, 1025), (2, 16, 8, 8), (2, 65, 16)]


def stored_step(step: dict[str, Tensor], with_reference: bool) -> Arguments:
    """The arguments of `sde_log_prob` by name, in its order, from those of `sde_step`."""
    names = ("x", "v", "noise", "c_x_B", "c_v_B", "weight_B", "constant_B")
    arguments: Arguments = {"x_next" if name == "noise" else name: step[name] for name in names}
    arguments["v_reference"] = step["v"].flip(0) if with_reference else None
    arguments["kl_weight_B"] = step["std_B"] + 1 if with_reference else None
    return arguments


def test_values_by_hand() -> None:
    one = torch.ones(1)
    log_prob_B, kl_B = sde_log_prob(
        torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, -2.0]]), torch.tensor([[7.5, -1.5]]),
        one * 0.5, one * 0.25, one * 0.125, one * 10, torch.tensor([[0.0, 2.0]]), one * 3,
    )  # fmt: skip
    # mean = (1.5, 0.5), x_next - mean = (6, -2); 0.25 (v - v_reference) = (1, -1)
    assert log_prob_B.tolist() == [10 - 0.125 * 20]
    assert kl_B.tolist() == [3 * 1]


def test_kl_is_zero_without_a_reference(make_step: MakeStep) -> None:
    _, kl_B = sde_log_prob(**stored_step(make_step(3, 7), with_reference=False))
    assert kl_B.tolist() == [0, 0, 0]


@given(shift=st.floats(-3, 3), c_v=st.floats(-2, 2), s=st.floats(0.1, 2))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_kl_is_the_divergence_of_two_normals_of_scale_s(shift: float, c_v: float, s: float) -> None:
    v, one = torch.linspace(-1, 1, 6)[None], torch.ones(1)
    _, kl_B = sde_log_prob(
        v, v + shift, v, one, one * c_v, one, one, v_reference=v, kl_weight_B=0.5 / (one * s).square()
    )
    policy, reference = (torch.distributions.Normal(v + c_v * velocity, s) for velocity in (v + shift, v))
    divergence = torch.distributions.kl_divergence(policy, reference).mean(dim=1)
    torch.testing.assert_close(kl_B, divergence, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("with_reference", [False, True], ids=["no reference", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poisoned_outputs")
def test_kernels_equal_their_references(
    make_step: MakeStep, shape: tuple[int, ...], dtype: torch.dtype, with_reference: bool, kernel_device: str
) -> None:
    arguments = stored_step(make_step(*shape, dtype=dtype, device=kernel_device), with_reference)
    results, expected = _sde_log_prob_triton(*arguments.values()), sde_log_prob_reference(*arguments.values())
    torch.testing.assert_close(results, expected, **FORWARD_TOLERANCE)
    del arguments["constant_B"]
    grads = torch.linspace(-2, 2, shape[0], device=kernel_device), torch.linspace(1, 3, shape[0], device=kernel_device)
    grad_v = _sde_log_prob_backward_triton(*grads, *arguments.values())
    assert grad_v.dtype == dtype
    torch.testing.assert_close(
        grad_v, sde_log_prob_backward_reference(*grads, *arguments.values()), **TOLERANCES[dtype]
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("outputs", ["log_prob", "kl", "both"])
@pytest.mark.parametrize("shape", [(3, 1), (2, 7), (2, 5, 5, 41)], ids=str)
def test_gradient_is_that_of_autograd_through_the_reference(
    make_step: MakeStep, shape: tuple[int, ...], outputs: str, device: str
) -> None:
    arguments = stored_step(make_step(*shape, device=device), with_reference=True)
    v = arguments["v"] = arguments["v"].detach().mT.contiguous().mT.requires_grad_()

    def grad_of(log_prob_B: Tensor, kl_B: Tensor) -> Tensor:
        parts = {"log_prob": log_prob_B.exp(), "kl": kl_B.square(), "both": log_prob_B.exp() + kl_B.square()}
        return torch.autograd.grad(parts[outputs].sum(), v)[0]

    grad = grad_of(*sde_log_prob(**arguments))
    expected = grad_of(*sde_log_prob_reference(*arguments.values()))
    torch.testing.assert_close(grad, expected, **TOLERANCES[torch.float32])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("with_reference", [False, True], ids=["no reference", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operators_are_well_formed(make_step: MakeStep, dtype: torch.dtype, with_reference: bool, device: str) -> None:
    arguments = stored_step(make_step(3, 2, 5, dtype=dtype, device=device), with_reference)
    grads = torch.ones(3, device=device), torch.ones(3, device=device)
    backward = [value for name, value in arguments.items() if name != "constant_B"]
    torch.library.opcheck(torch.ops.fastgrpo.sde_log_prob_backward.default, (*grads, *backward))
    arguments["v"] = arguments["v"].mT.contiguous().mT.requires_grad_()
    torch.library.opcheck(torch.ops.fastgrpo.sde_log_prob.default, tuple(arguments.values()))


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_into_one_graph_with_its_gradient(make_step: MakeStep, device: str) -> None:
    arguments = stored_step(make_step(3, 2, 5, device=device), with_reference=True)
    v = arguments["v"].requires_grad_()

    def loss(**arguments: Any) -> Tensor:
        log_prob_B, kl_B = sde_log_prob(**arguments)
        return (log_prob_B.exp() + kl_B).sum()

    compiled = torch.compile(loss, fullgraph=True)
    result, expected = compiled(**arguments), loss(**arguments)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(torch.autograd.grad(result, v), torch.autograd.grad(expected, v))


def test_wrong_input_is_refused_with_the_remedy(make_step: MakeStep) -> None:
    arguments = stored_step(make_step(3, 2, 5), with_reference=True)
    for change, message in (
        ({"x_next": torch.zeros(3, 2, 4)}, r"x_next is \(3, 2, 4\) .*; pass the same shape"),
        ({"v_reference": torch.zeros(2, 2, 5)}, r"v_reference is \(2, 2, 5\) .*; pass the same shape"),
        ({"v_reference": None}, "v_reference is missing; pass v_reference and kl_weight_B together, or neither"),
        ({"kl_weight_B": None}, "kl_weight_B is missing; pass"),
        ({"constant_B": torch.zeros(())}, r"constant_B must be float32 of shape \(3,\) .*; pass one number per sample"),
        ({"x_next": torch.zeros(3, 2, 5, requires_grad=True)}, r"x_next requires a gradient; pass x_next.detach\(\)"),
    ):
        with pytest.raises(ValueError, match=message):
            sde_log_prob(**{**arguments, **change})
