"""One reverse step: its values, its log-probability, its gradient, and the kernel."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgrpo_kernels import sde_step
from fastgrpo_kernels.sde_log_prob import _sde_log_prob_triton, sde_log_prob_reference
from fastgrpo_kernels.sde_step import _sde_step_triton, sde_step_reference
from tests.kernels.parameters import DEVICES, DTYPES

MakeStep = Callable[..., dict[str, Tensor]]
# x_next is exact: every product and sum is rounded alike; log_prob is a float64 sum, rounded once
LOG_PROB_TOLERANCE: dict[str, Any] = {"rtol": 3e-7, "atol": 1e-7}
# one element, odd, exactly one block, one past it, a latent, tokens
SHAPES = [(3, 1), (2, 7), (2, 1024), (3, 1025), (2, 16, 8, 8), (2, 65, 16)]


def test_step_by_hand() -> None:
    one = torch.ones(1)
    x_next, log_prob = sde_step(
        torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, -2.0]]), torch.tensor([[3.0, -1.0]]),
        one * 0.5, one * 0.25, one * 2, one * 0.125, one * 10,
    )  # fmt: skip
    # mean = (1.5, 0.5), x_next - mean = (6, -2), mean square 20
    assert x_next.tolist() == [[7.5, -1.5]]
    assert log_prob.tolist() == [10 - 0.125 * 20]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_log_prob_is_the_normal_density_of_the_stored_value(make_step: MakeStep, dtype: torch.dtype) -> None:
    step = make_step(3, 4, 5, 5, dtype=dtype)
    x_next, log_prob_B = sde_step(**step)
    c_x, c_v, std = (step[name].view(3, 1, 1, 1) for name in ("c_x_B", "c_v_B", "std_B"))
    density = torch.distributions.Normal(c_x * step["x"].float() + c_v * step["v"].float(), std)
    assert x_next.dtype == dtype
    torch.testing.assert_close(log_prob_B, density.log_prob(x_next.float()).mean(dim=(1, 2, 3)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poisoned_outputs")
def test_kernel_equals_reference(
    make_step: MakeStep, shape: tuple[int, ...], dtype: torch.dtype, kernel_device: str
) -> None:
    step = make_step(*shape, dtype=dtype, device=kernel_device)
    x_next, log_prob_B = _sde_step_triton(*step.values())
    x_next_expected, log_prob_B_expected = sde_step_reference(*step.values())
    assert torch.equal(x_next, x_next_expected)
    torch.testing.assert_close(log_prob_B, log_prob_B_expected, **LOG_PROB_TOLERANCE)


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "strided"])
def test_layout_of_the_inputs_does_not_matter(make_step: MakeStep, layout: str, kernel_device: str) -> None:
    step = make_step(3, 4, 6, 5, device=kernel_device)

    def lay_out(x: Tensor) -> Tensor:
        if layout == "channels_last":
            return x.contiguous(memory_format=torch.channels_last)
        if layout == "transposed":
            return x.transpose(1, 3).contiguous().transpose(1, 3)
        return torch.stack([x, -x], dim=-1)[..., 0]

    other = {name: lay_out(value) if value.dim() == 4 else value for name, value in step.items()}
    # a coefficient may be one number expanded, or a column
    other["c_x_B"] = torch.stack([step["c_x_B"], -step["c_x_B"]], dim=1)[:, 0]
    assert not other["x"].is_contiguous()
    for run in (sde_step_reference, _sde_step_triton):
        for result, expected in zip(run(*other.values()), run(*step.values()), strict=True):
            assert torch.equal(result, expected)
            assert result.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_log_prob_is_that_of_sde_log_prob_bit_for_bit(
    make_step: MakeStep, dtype: torch.dtype, kernel_device: str
) -> None:
    step = make_step(6, 3, 700, dtype=dtype, device=kernel_device)
    coefficients = [step[name] for name in ("c_x_B", "c_v_B", "weight_B", "constant_B")]
    pairs: list[tuple[Callable[..., Any], Callable[..., Any]]] = [
        (sde_step_reference, sde_log_prob_reference),
        (_sde_step_triton, _sde_log_prob_triton),
    ]
    for forward, again in pairs:
        x_next, log_prob_B = forward(*step.values())
        # one sample at a time: the batch of the update is not the batch of the rollout
        for b in range(6):
            one = slice(b, b + 1)
            stored: list[Any] = [value[one] for value in (step["x"], step["v"], x_next, *coefficients)]
            log_prob, _ = again(*stored, None, None)
            assert torch.equal(log_prob, log_prob_B[one])


@pytest.mark.parametrize("device", DEVICES)
def test_gradient_flows_from_log_prob_to_v_and_x_next_is_a_sample(make_step: MakeStep, device: str) -> None:
    step = make_step(3, 2, 9, device=device)
    v = step["v"].requires_grad_()
    x_next, log_prob_B = sde_step(**step)
    assert not x_next.requires_grad
    (grad,) = torch.autograd.grad(log_prob_B.square().sum(), v)
    mean = step["c_x_B"].view(3, 1, 1) * step["x"] + step["c_v_B"].view(3, 1, 1) * v
    density = torch.distributions.Normal(mean, step["std_B"].view(3, 1, 1))
    (expected,) = torch.autograd.grad(density.log_prob(x_next).mean(dim=(1, 2)).square().sum(), v)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operator_is_well_formed(make_step: MakeStep, dtype: torch.dtype, device: str) -> None:
    step = make_step(3, 2, 5, dtype=dtype, device=device)
    step["v"] = step["v"].mT.contiguous().mT.requires_grad_()
    torch.library.opcheck(torch.ops.fastgrpo.sde_step.default, tuple(step.values()))


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_into_one_graph(make_step: MakeStep, device: str) -> None:
    step = make_step(3, 2, 5, device=device)

    def doubled(**arguments: Tensor) -> tuple[Tensor, Tensor]:
        x_next, log_prob_B = sde_step(**arguments)
        return 2 * x_next, 2 * log_prob_B

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    for result, expected in zip(compiled(**step), doubled(**step), strict=True):
        assert torch.equal(result, expected)


def test_wrong_input_is_refused_with_the_remedy(make_step: MakeStep) -> None:
    step = make_step(3, 2, 5)
    for change, message in (
        ({"x": torch.zeros(3)}, r"x must be a non-empty \[B, ...\], got \(3,\); add a batch dimension"),
        ({"v": torch.zeros(3, 2, 4)}, r"v is \(3, 2, 4\) .* x \(3, 2, 5\) .*; pass the same shape"),
        ({"noise": torch.zeros(3, 2, 5, dtype=torch.int64)}, "noise must be floating point, got torch.int64; cast it"),
        ({"c_x_B": torch.zeros(3, 1)}, r"c_x_B must be float32 of shape \(3,\) .*; pass one number per sample"),
        ({"weight_B": torch.zeros(3, dtype=torch.float64)}, "weight_B must be float32 .* got torch.float64"),
        ({"std_B": torch.zeros(3)}, "std_B must be positive, got .*; take a deterministic step"),
        ({"x": step["x"].clone().requires_grad_()}, r"x requires a gradient; pass x.detach\(\)"),
    ):
        with pytest.raises(ValueError, match=message):
            sde_step(**{**step, **change})
