"""The log-probability of a stored step and its KL: values, gradients, and the kernels."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastgrpo_kernels import GuidedVelocity, combined, sde_log_prob
from fastgrpo_kernels.guidance import branches
from fastgrpo_kernels.sde_log_prob import _sde_log_prob_triton, sde_log_prob_reference
from fastgrpo_kernels.sde_log_prob_backward import _sde_log_prob_backward_triton, sde_log_prob_backward_reference
from tests.kernels.parameters import ALL_CHECKS, DEVICES, DTYPES, QUICK_CHECKS, covering

MakeStep = Callable[..., dict[str, Any]]
Arguments = dict[str, Any]
# of a gradient in this dtype; half-precision ones may differ by one rounding
TOLERANCES: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-7},
    torch.float16: {"rtol": 1e-3, "atol": 1e-6},
    torch.bfloat16: {"rtol": 8e-3, "atol": 1e-6},
}
FORWARD_TOLERANCE: dict[str, Any] = {"rtol": 3e-7, "atol": 1e-7}
SHAPES = [(3, 1), (2, 7), (2, 1024), (3, 1025), (2, 16, 8, 8), (2, 65, 16), (0, 4, 2)]
VARIANTS = [
    {"guided": guided, "with_reference": with_reference, "log_prob": kind}
    for guided, with_reference, kind in (
        (False, False, "gaussian"),
        (True, False, "cps"),
        (False, True, "cps"),
        (True, True, "gaussian"),
    )
]


def name_of(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    return "-".join([name for name, on in value.items() if on is True] + [value["log_prob"]])


def stored_step(step: dict[str, Any], *, with_reference: bool, log_prob: str = "gaussian") -> Arguments:
    """The arguments of `sde_log_prob` by name, from those of `sde_step`."""
    arguments: Arguments = {name: step[name] for name in ("x", "v", "c_x", "c_v", "std")}
    arguments |= {"x_next": step["noise"], "log_prob": log_prob}
    if with_reference:
        v = step["v"]
        is_guided = isinstance(v, GuidedVelocity)
        flipped = GuidedVelocity(v.conditional.flip(0), v.unconditional * 0.5, v.scale) if is_guided else v.flip(0)
        arguments |= {"v_reference": flipped, "kl_weight": step["std"] + 1}
    return arguments


def op_arguments(arguments: Arguments) -> tuple[Any, ...]:
    """Those of the operator, from those of the public function."""
    reference: tuple[Any, ...] = (None, None)
    if "v_reference" in arguments:
        reference = branches("v_reference", arguments["v_reference"])[:2]
    coefficients = [arguments[name] for name in ("c_x", "c_v", "std")]
    gaussian = arguments["log_prob"] == "gaussian"
    velocity = branches("v", arguments["v"])
    return (
        arguments["x"], *velocity, arguments["x_next"], *coefficients, gaussian, *reference, arguments.get("kl_weight")
    )  # fmt: skip


def by_distributions(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """log_prob and KL by PyTorch's own distributions."""
    column = (-1, *[1] * (arguments["x"].dim() - 1))
    c_x, c_v, std = (arguments[name].view(column) for name in ("c_x", "c_v", "std"))
    dims = tuple(range(1, arguments["x"].dim()))
    x, x_next = arguments["x"].float(), arguments["x_next"].float()
    mean = c_x * x + c_v * combined(arguments["v"])
    if arguments["log_prob"] == "gaussian":
        log_prob_B = torch.distributions.Normal(mean, std).log_prob(x_next).mean(dim=dims)
    else:
        log_prob_B = -(x_next - mean).square().mean(dim=dims)
    if "v_reference" not in arguments:
        return log_prob_B, torch.zeros_like(log_prob_B)
    mean_reference = c_x * x + c_v * combined(arguments["v_reference"])
    return log_prob_B, arguments["kl_weight"] * (mean - mean_reference).square().mean(dim=dims)


def test_values_by_hand() -> None:
    x, v, x_next = torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, -2.0]]), torch.tensor([[7.5, -1.5]])
    reference = torch.tensor([[0.0, 2.0]])
    log_prob_B, kl_B = sde_log_prob(x, v, x_next, 0.5, 0.25, 2.0, log_prob="cps", v_reference=reference, kl_weight=3.0)
    # mean = (1.5, 0.5), x_next - mean = (6, -2); 0.25 (v - v_reference) = (1, -1)
    assert log_prob_B.tolist() == [-20]
    assert kl_B.tolist() == [3 * 1]
    gaussian_B, no_kl_B = sde_log_prob(x, v, x_next, 0.5, 0.25, 2.0)
    assert gaussian_B.tolist() == pytest.approx([-20 / 8 - 0.6931472 - 0.9189385])
    assert no_kl_B.tolist() == [0]


@given(shift=st.floats(-3, 3), c_v=st.floats(-2, 2), s=st.floats(0.1, 2))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_kl_is_the_divergence_of_two_normals_of_scale_s(shift: float, c_v: float, s: float) -> None:
    v = torch.linspace(-1, 1, 6)[None]
    _, kl_B = sde_log_prob(v, v + shift, v, 1.0, c_v, 1.0, v_reference=v, kl_weight=0.5 / s**2)
    policy, reference = (torch.distributions.Normal(v + c_v * velocity, s) for velocity in (v + shift, v))
    divergence = torch.distributions.kl_divergence(policy, reference).mean(dim=1)
    torch.testing.assert_close(kl_B, divergence, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
@pytest.mark.parametrize("device", DEVICES)
def test_values_and_gradient_are_those_of_distributions(
    make_step: MakeStep, variant: dict[str, Any], device: str
) -> None:
    guided, rest = variant["guided"], {name: variant[name] for name in ("with_reference", "log_prob")}
    arguments = stored_step(make_step(3, 4, 5, 41, device=device, guided=guided), **rest)
    v = (arguments["v"].conditional if guided else arguments["v"]).requires_grad_()
    results, expected = sde_log_prob(**arguments), by_distributions(arguments)
    torch.testing.assert_close(results, expected, rtol=2e-6, atol=1e-6)

    def loss(log_prob_B: Tensor, kl_B: Tensor) -> Tensor:
        return (log_prob_B.square() + kl_B.square()).sum()

    grad, expected_grad = (torch.autograd.grad(loss(*both), v)[0] for both in (results, expected))
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-7 * expected_grad.abs().max().item())


@pytest.mark.parametrize(("shape", "dtype", "variant"), covering(SHAPES, DTYPES, VARIANTS), ids=name_of)
@pytest.mark.usefixtures("poisoned_outputs")
def test_kernels_equal_their_references(
    make_step: MakeStep, shape: tuple[int, ...], dtype: torch.dtype, variant: dict[str, Any], kernel_device: str
) -> None:
    step = make_step(*shape, dtype=dtype, device=kernel_device, guided=variant["guided"])
    arguments = op_arguments(stored_step(step, with_reference=variant["with_reference"], log_prob=variant["log_prob"]))
    results, expected = _sde_log_prob_triton(*arguments), sde_log_prob_reference(*arguments)
    # a sum in float64 rounds to one float32 in any order; logarithms may differ
    tolerance = FORWARD_TOLERANCE if variant["log_prob"] == "gaussian" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(results, expected, **tolerance)
    grads = torch.linspace(-2, 2, shape[0], device=kernel_device), torch.linspace(1, 3, shape[0], device=kernel_device)
    grad_v = _sde_log_prob_backward_triton(*grads, *arguments)
    assert grad_v.dtype == dtype
    torch.testing.assert_close(grad_v, sde_log_prob_backward_reference(*grads, *arguments), **TOLERANCES[dtype])


def test_kernels_take_any_layout(make_step: MakeStep, kernel_device: str) -> None:
    plain = stored_step(make_step(3, 4, 5, device=kernel_device, guided=False), with_reference=True)
    # latents transposed, every other one of twice as many coefficients, one gradient for all samples
    latents = {name: plain[name].mT.contiguous().mT for name in ("x", "v", "x_next", "v_reference")}
    strided = {name: plain[name].repeat_interleave(2)[::2] for name in ("c_x", "c_v", "std", "kl_weight")}
    grad_B = torch.tensor(0.7, device=kernel_device).expand(3)
    contiguous, other = op_arguments(plain), op_arguments({**plain, **latents, **strided})
    assert torch.equal(torch.stack(_sde_log_prob_triton(*other)), torch.stack(_sde_log_prob_triton(*contiguous)))
    grads = [
        _sde_log_prob_backward_triton(grad_B, grad_B, *other),
        _sde_log_prob_backward_triton(grad_B.contiguous(), grad_B.contiguous(), *contiguous),
    ]
    assert torch.equal(*grads)


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
    expected = grad_of(*sde_log_prob_reference(*op_arguments(arguments)))
    torch.testing.assert_close(grad, expected, **TOLERANCES[torch.float32])


def test_guidance_scales_the_gradient_of_the_conditional_branch_alone(make_step: MakeStep) -> None:
    step = make_step(2, 3, 8, guided=True)
    arguments = stored_step(step, with_reference=False)
    conditional = step["v"].conditional.requires_grad_()
    (fused,) = torch.autograd.grad(sde_log_prob(**arguments)[0].sum(), conditional)
    v = combined(step["v"]).detach().requires_grad_()
    (full,) = torch.autograd.grad(sde_log_prob(**{**arguments, "v": v})[0].sum(), v)
    torch.testing.assert_close(fused, 4.5 * full, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_operators_are_well_formed(make_step: MakeStep, variant: dict[str, Any], device: str) -> None:
    # the gradient's dtype differs from that of the results only where latents are not float32
    step = make_step(3, 2, 5, dtype=torch.bfloat16, device=device, guided=variant["guided"])
    step = stored_step(step, with_reference=variant["with_reference"], log_prob=variant["log_prob"])
    x, v, *rest = op_arguments(step)
    grads = torch.ones(3, device=device), torch.ones(3, device=device)
    checks = ALL_CHECKS if variant in (VARIANTS[0], VARIANTS[-1]) else QUICK_CHECKS
    backward, forward = torch.ops.fastgrpo.sde_log_prob_backward.default, torch.ops.fastgrpo.sde_log_prob.default
    torch.library.opcheck(backward, (*grads, x, v, *rest), test_utils=checks)
    torch.library.opcheck(forward, (x, v.mT.contiguous().mT.requires_grad_(), *rest), test_utils=checks)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_compiles_into_one_graph_with_its_gradient(make_step: MakeStep, variant: dict[str, Any], device: str) -> None:
    guided = variant["guided"]
    step = make_step(3, 2, 5, device=device, guided=guided)
    arguments = stored_step(step, with_reference=variant["with_reference"], log_prob=variant["log_prob"])
    v = (step["v"].conditional if guided else step["v"]).requires_grad_()

    def loss(**arguments: Any) -> Tensor:
        log_prob_B, kl_B = sde_log_prob(**arguments)
        return (log_prob_B.exp() + kl_B).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    result, expected = compiled(**arguments), loss(**arguments)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(torch.autograd.grad(result, v), torch.autograd.grad(expected, v))


def test_wrong_input_is_refused_with_the_remedy(make_step: MakeStep) -> None:
    arguments = stored_step(make_step(3, 2, 5), with_reference=True)
    zeros = torch.zeros(3, 2, 5)
    for change, message in (
        ({"x_next": torch.zeros(3, 2, 4)}, r"x_next is \(3, 2, 4\) .*; pass the same shape"),
        ({"v_reference": torch.zeros(2, 2, 5)}, r"v_reference is \(2, 2, 5\) .*; pass the same shape"),
        ({"v_reference": None}, "v_reference is missing; pass v_reference and kl_weight together, or neither"),
        ({"kl_weight": None}, "kl_weight is missing; pass"),
        ({"v_reference": GuidedVelocity(zeros, zeros, 2.0)}, "v has guidance 1 and v_reference 2; guide both alike"),
        ({"v_reference": torch.zeros(3, 2, 5, requires_grad=True)}, "v_reference requires a gradient; pass v_ref"),
        ({"kl_weight": torch.zeros(())}, r"kl_weight must be float32 of shape \(3,\) .*; pass a number, or one"),
        ({"std": 0.0}, "std must be positive, got 0.0; a deterministic step has no log_prob"),
        ({"log_prob": "none"}, "log_prob must be 'gaussian' or 'cps', got 'none'"),
        ({"x_next": torch.zeros(3, 2, 5, requires_grad=True)}, r"x_next requires a gradient; pass x_next.detach\(\)"),
    ):
        with pytest.raises(ValueError, match=message):
            sde_log_prob(**{**arguments, **change})
