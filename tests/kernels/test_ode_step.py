"""The deterministic step: its values, guidance, gradient, and the kernel."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgrpo_kernels import GuidedVelocity, combined, ode_step
from fastgrpo_kernels.guidance import branches
from fastgrpo_kernels.ode_step import _ode_step_triton, ode_step_reference
from tests.kernels.parameters import ALL_CHECKS, BACKEND, DEVICES, DTYPES, QUICK_CHECKS, covering

MakeStep = Callable[..., dict[str, Any]]
SHAPES = [(3, 1), (2, 7), (2, 1024), (3, 1025), (2, 16, 8, 8), (2, 65, 16), (0, 4)]


def op_arguments(step: dict[str, Any]) -> tuple[Any, ...]:
    return (step["x"], *branches("v", step["v"]), step["c_x"], step["c_v"])


def public_arguments(step: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(step[name] for name in ("x", "v", "c_x", "c_v"))


def test_values_by_hand() -> None:
    x, v, v_uncond = torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, -2.0]]), torch.tensor([[2.0, 0.0]])
    assert ode_step(x, v, 1.0, -0.25).tolist() == [[0.0, 2.5]]
    # v = (2, 0) + 1.5 * (2, -2) = (5, -3)
    guided = GuidedVelocity(v, v_uncond, 1.5)
    assert combined(guided).tolist() == [[5.0, -3.0]]
    assert ode_step(x, guided, 0.5, -0.5).tolist() == [[-2.0, 2.5]]


@pytest.mark.parametrize(("shape", "dtype", "guided"), covering(SHAPES, DTYPES, [False, True]), ids=str)
@pytest.mark.usefixtures("poisoned_outputs")
def test_kernel_equals_reference_bit_for_bit(
    make_step: MakeStep, shape: tuple[int, ...], dtype: torch.dtype, guided: bool, kernel_device: str
) -> None:
    arguments = op_arguments(make_step(*shape, dtype=dtype, device=kernel_device, guided=guided))
    assert torch.equal(_ode_step_triton(*arguments), ode_step_reference(*arguments))


def test_kernel_takes_any_layout(make_step: MakeStep, kernel_device: str) -> None:
    step = make_step(3, 4, 5, device=kernel_device)
    latents = {name: step[name].mT.contiguous().mT for name in ("x", "v")}
    strided = {name: step[name].repeat_interleave(2)[::2] for name in ("c_x", "c_v")}
    result = _ode_step_triton(*op_arguments({**step, **latents, **strided}))
    assert torch.equal(result, _ode_step_triton(*op_arguments(step)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_is_that_of_the_formula(make_step: MakeStep, guided: bool, dtype: torch.dtype, device: str) -> None:
    step = make_step(3, 2, 9, dtype=dtype, device=device, guided=guided)
    v = (step["v"].conditional if guided else step["v"]).requires_grad_()
    weight = torch.linspace(-1, 1, 18, device=device).view(2, 9)
    (grad,) = torch.autograd.grad((ode_step(*public_arguments(step)).float() * weight).sum(), v)
    slope = step["c_v"].view(3, 1, 1) * (4.5 if guided else 1.0)
    assert grad.dtype == dtype
    torch.testing.assert_close(grad.float(), (slope * weight).to(dtype).float(), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("guided", [False, True])
def test_operator_is_well_formed(make_step: MakeStep, guided: bool, device: str) -> None:
    x, v, *rest = op_arguments(make_step(3, 2, 5, device=device, guided=guided))
    arguments = (x, v.mT.contiguous().mT.requires_grad_(), *rest)
    checks = ALL_CHECKS if guided else QUICK_CHECKS
    torch.library.opcheck(torch.ops.fastgrpo.ode_step.default, arguments, test_utils=checks)


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_into_one_graph_with_its_gradient(make_step: MakeStep, device: str) -> None:
    step = make_step(3, 2, 5, device=device, guided=True)
    v = step["v"].conditional.requires_grad_()

    def loss(*arguments: Any) -> Tensor:
        return ode_step(*arguments).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend=BACKEND)
    result, expected = compiled(*public_arguments(step)), loss(*public_arguments(step))
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(torch.autograd.grad(result, v), torch.autograd.grad(expected, v))


def test_wrong_input_is_refused_with_the_remedy(make_step: MakeStep) -> None:
    step = make_step(3, 2, 5)
    for change, message in (
        ({"x": torch.zeros(3, 2, 4)}, r"v is \(3, 2, 5\) .* x \(3, 2, 4\) .*; pass the same shape"),
        ({"c_x": torch.zeros(())}, r"c_x must be float32 of shape \(3,\) .*; pass a number"),
        ({"c_v": torch.zeros(3, requires_grad=True)}, r"c_v requires a gradient; pass c_v.detach\(\)"),
    ):
        with pytest.raises(ValueError, match=message):
            ode_step(*public_arguments({**step, **change}))
