"""The errors of losses on the forward process: values, gradients, and the kernels."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastgrpo_kernels import GuidedVelocity, MatchingErrors, PhiloxNoise, matching_loss, philox_normal
from fastgrpo_kernels.matching_loss import _matching_loss_triton, matching_loss_reference
from fastgrpo_kernels.matching_loss_backward import _matching_loss_backward_triton, matching_loss_backward_reference
from fastgrpo_kernels.noise import noise_arguments
from tests.kernels.parameters import ALL_CHECKS, DEVICES, DTYPES, QUICK_CHECKS, covering

Arguments = dict[str, Any]
SHAPES = [(3, 1), (2, 7), (2, 1024), (3, 1025), (2, 16, 8, 8), (2, 65, 16), (0, 4, 2)]
VARIANTS = [
    {"with_old": with_old, "drawn": drawn, "with_reference": with_reference}
    for with_old, drawn, with_reference in (
        (True, False, True),
        (False, False, False),
        (True, True, False),
        (False, True, True),
    )
]
DIFFERENTIABLE = ("plus", "minus", "drift", "reference")
# of means over float32 errors, which cancel as plain float32 does
TOLERANCE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}


def name_of(value: Any) -> str:
    return "-".join(name for name, on in value.items() if on) or "plain" if isinstance(value, dict) else str(value)


def make(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    other_dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    with_old: bool = True,
    drawn: bool = False,
    with_reference: bool = True,
    beta: float = 0.7,
) -> Arguments:
    """The arguments of `matching_loss` by name; v and v_reference have ``dtype``, the others the other one."""
    generator = torch.Generator().manual_seed(0)
    v, v_old, x_0, noise, v_reference = (torch.randn(shape, generator=generator) for _ in range(5))
    ids_B = torch.arange(shape[0], device=device)
    return {
        "v": v.to(device, dtype),
        "v_old": v_old.to(device, other_dtype) if with_old else None,
        "x_0": x_0.to(device, other_dtype),
        "noise": PhiloxNoise(2**40 + 3, 1002, ids_B + 5, ids_B) if drawn else noise.to(device, other_dtype),
        "beta": beta,
        "v_reference": v_reference.to(device, dtype) if with_reference else None,
    }


def op_arguments(arguments: Arguments) -> tuple[Any, ...]:
    """Those of the operator, from those of the public function."""
    v, v_old, x_0, noise, beta, v_reference = arguments.values()
    return (v, v_old, x_0, *noise_arguments("v", v, noise), beta, v_reference)


def given_noise(arguments: Arguments) -> Tensor:
    noise, v = arguments["noise"], arguments["v"]
    if isinstance(noise, Tensor):
        return noise
    ids = noise.prompt_ids_B, noise.sample_ids_B[:, None]
    return philox_normal(noise.seed, noise.stream, *ids, v[0].numel()).view(v.shape)


def by_formula(arguments: Arguments) -> MatchingErrors:
    """The errors as they are published, through autograd, in float64."""
    v, v_old, v_reference = arguments["v"].double(), arguments["v_old"], arguments["v_reference"]
    v_old = v.detach() if v_old is None else v_old.double()
    target = given_noise(arguments).double() - arguments["x_0"].double()
    beta, dims = arguments["beta"], tuple(range(1, v.dim()))
    plus = beta * v + (1 - beta) * v_old - target
    minus = (1 + beta) * v_old - beta * v - target
    reference = v.detach() * 0 if v_reference is None else v - v_reference.double()
    return MatchingErrors(
        *(error.square().mean(dim=dims) for error in (plus, minus, v_old - target)),
        *(error.detach().abs().mean(dim=dims) for error in (plus, minus)),
        *(error.square().mean(dim=dims) for error in (v - v_old, reference)),
    )


def test_values_and_gradients_by_hand() -> None:
    v = torch.tensor([[3.0, 1.0]], requires_grad=True)
    v_old, x_0, noise = torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 2.0]])
    reference = torch.tensor([[0.0, 5.0]])
    # u = (-1, 1), v+ = (2, 2), v- = (0, 4)
    errors = matching_loss(v, v_old, x_0, noise, beta=0.5, v_reference=reference)
    by_hand = {
        "plus": (9 + 1) / 2, "minus": (1 + 9) / 2, "old": (4 + 4) / 2, "abs_plus": (3 + 1) / 2,
        "abs_minus": (1 + 3) / 2, "drift": (4 + 4) / 2, "reference": (9 + 16) / 2,
    }  # fmt: skip
    assert {name: error.tolist() for name, error in errors._asdict().items()} == {
        name: [value] for name, value in by_hand.items()
    }
    # 2 / D = 1: beta (v+ - u), -beta (v- - u), v - v_old, v - v_reference
    for name, grad in (
        ("plus", [1.5, 0.5]), ("minus", [-0.5, -1.5]), ("drift", [2.0, -2.0]), ("reference", [3.0, -4.0])
    ):  # fmt: skip
        assert torch.autograd.grad(getattr(errors, name), v, retain_graph=True)[0].tolist() == [grad], name
    assert not any(getattr(errors, name).requires_grad for name in ("old", "abs_plus", "abs_minus"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
@pytest.mark.parametrize("shape", [(3, 1), (2, 7), (2, 5, 5, 41)], ids=str)
def test_errors_and_gradients_are_those_of_the_published_formula(
    shape: tuple[int, ...], variant: dict[str, Any], device: str
) -> None:
    arguments = make(*shape, device=device, **variant)
    v = arguments["v"] = arguments["v"].mT.contiguous().mT.requires_grad_()
    errors, expected = matching_loss(**arguments), by_formula(arguments)
    for name in MatchingErrors._fields:
        torch.testing.assert_close(getattr(errors, name).double(), getattr(expected, name), **TOLERANCE)
    # a square root has no derivative at 0, where drift and reference are constant
    wanted = [name for name in DIFFERENTIABLE if (getattr(expected, name) > 0).all()]

    def grads_of(errors: MatchingErrors) -> list[Tensor]:
        """Of each error, and of all of them together."""
        roots = [getattr(errors, name).sqrt().sum() for name in wanted]
        values = [*roots, torch.stack(roots).square().sum()]
        return [torch.autograd.grad(value, v, retain_graph=True)[0] for value in values]

    for grad, expected_grad in zip(grads_of(errors), grads_of(expected), strict=True):
        torch.testing.assert_close(grad, expected_grad, **TOLERANCE)
    for name in set(DIFFERENTIABLE) - set(wanted):
        assert torch.autograd.grad(getattr(errors, name).sum(), v, retain_graph=True)[0].count_nonzero() == 0, name


@pytest.mark.parametrize("device", DEVICES)
def test_half_precision_is_computed_in_float32_and_its_gradient_rounded_once(device: str) -> None:
    half = make(3, 700, dtype=torch.bfloat16, device=device)
    wide = {name: value.float() if isinstance(value, Tensor) else value for name, value in half.items()}
    errors, expected = (matching_loss(**{**each, "v": each["v"].requires_grad_()}) for each in (half, wide))
    assert all(torch.equal(one, other) for one, other in zip(errors, expected, strict=True))
    (grad,) = torch.autograd.grad(torch.stack(errors).sum(), half["v"])
    (expected_grad,) = torch.autograd.grad(torch.stack(expected).sum(), wide["v"])
    assert torch.equal(grad, expected_grad.bfloat16())


def test_a_rank_without_samples_has_no_errors_and_an_empty_gradient() -> None:
    arguments = make(0, 4, 2, drawn=True)
    v = arguments["v"].requires_grad_()
    errors = matching_loss(**arguments)
    assert all(error.shape == (0,) for error in errors)
    assert torch.autograd.grad(errors.plus.sum(), v)[0].shape == (0, 4, 2)


@given(beta=st.floats(0.01, 4), scale=st.floats(0.1, 10), shift=st.floats(-3, 3))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_plus_and_minus_are_old_and_drift(beta: float, scale: float, shift: float) -> None:
    arguments = make(3, 33, with_reference=False, beta=beta)
    arguments["v"] = scale * arguments["v"] + shift
    errors = matching_loss(**arguments)
    expected = 2 * errors.old + 2 * beta**2 * errors.drift
    torch.testing.assert_close(errors.plus + errors.minus, expected, rtol=2e-6, atol=0)
    # the mean of squares is at least the square of the mean
    assert (errors.abs_plus.square() <= errors.plus * (1 + 1e-6)).all()
    assert (errors.abs_minus.square() <= errors.minus * (1 + 1e-6)).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_old_velocity_is_the_velocity_itself_bit_for_bit(dtype: torch.dtype, drawn: bool, device: str) -> None:
    arguments = make(3, 2, 700, dtype=dtype, device=device, with_old=False, drawn=drawn)
    v = arguments["v"].requires_grad_()
    errors, same = matching_loss(**arguments), matching_loss(**{**arguments, "v_old": v.detach()})
    assert all(torch.equal(one, other) for one, other in zip(errors, same, strict=True))
    assert errors.drift.tolist() == [0, 0, 0]
    assert torch.equal(errors.plus, errors.minus)
    assert torch.equal(errors.plus, errors.old)
    assert torch.equal(errors.abs_plus, errors.abs_minus)
    # the two losses have the same value and opposite gradients
    grads = [
        torch.autograd.grad((3 * each.plus + each.minus + 7 * each.drift + each.reference).sum(), v)[0]
        for each in (errors, same)
    ]
    assert torch.equal(*grads)
    assert grads[0].count_nonzero() > 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("with_old", [False, True])
def test_drawn_noise_is_that_of_philox_normal_and_no_sample_depends_on_the_batch(with_old: bool, device: str) -> None:
    arguments = make(6, 3, 700, device=device, with_old=with_old, drawn=True)
    v = arguments["v"].requires_grad_()

    def errors_and_grad(arguments: Arguments, v: Tensor) -> tuple[Tensor, ...]:
        errors = matching_loss(**{**arguments, "v": v})
        return *errors, torch.autograd.grad((errors.plus / errors.abs_plus - 2 * errors.minus).sum(), v)[0]

    drawn = errors_and_grad(arguments, v)
    stored = errors_and_grad({**arguments, "noise": given_noise(arguments)}, v)
    assert all(torch.equal(one, other) for one, other in zip(drawn, stored, strict=True))
    for b in range(6):
        one = slice(b, b + 1)
        part = {name: value if value is None or name == "beta" else value[one] for name, value in arguments.items()}
        alone = errors_and_grad(part, v[one].detach().requires_grad_())
        assert all(torch.equal(value, together[one]) for value, together in zip(alone, drawn, strict=True))


@pytest.mark.parametrize(
    ("shape", "dtype", "other_dtype", "variant"), covering(SHAPES, DTYPES, DTYPES, VARIANTS), ids=name_of
)
@pytest.mark.usefixtures("poisoned_outputs")
def test_kernels_equal_references_bit_for_bit(
    shape: tuple[int, ...], dtype: torch.dtype, other_dtype: torch.dtype, variant: dict[str, Any], kernel_device: str
) -> None:
    arguments = op_arguments(make(*shape, dtype=dtype, other_dtype=other_dtype, device=kernel_device, **variant))
    # sums in float64 round to one float32 in any order
    assert torch.equal(_matching_loss_triton(*arguments), matching_loss_reference(*arguments))
    grad_EB = torch.linspace(-1, 2, 7 * shape[0], device=kernel_device).view(7, shape[0])
    grad, expected = (
        run(grad_EB, *arguments) for run in (_matching_loss_backward_triton, matching_loss_backward_reference)
    )
    assert grad.dtype == dtype
    assert torch.equal(grad, expected)


def test_kernels_take_any_layout(kernel_device: str) -> None:
    plain = make(3, 4, 5, device=kernel_device)
    latents = {name: value.mT.contiguous().mT for name, value in plain.items() if isinstance(value, Tensor)}
    contiguous, other = op_arguments(plain), op_arguments({**plain, **latents})
    assert torch.equal(_matching_loss_triton(*other), _matching_loss_triton(*contiguous))
    # one gradient for all samples
    grad_EB = torch.tensor(0.7, device=kernel_device).expand(7, 3)
    grads = [
        _matching_loss_backward_triton(grad_EB, *other),
        _matching_loss_backward_triton(grad_EB.contiguous(), *contiguous),
    ]
    assert torch.equal(*grads)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_operators_are_well_formed(variant: dict[str, Any], device: str) -> None:
    # the gradient's dtype differs from that of the results only where v is not float32
    v, *rest = op_arguments(make(3, 2, 5, dtype=torch.bfloat16, device=device, **variant))
    # noise that is drawn under symbolic shapes is checked with `add_noise`
    checks = ALL_CHECKS if variant == VARIANTS[0] else QUICK_CHECKS
    backward, forward = torch.ops.fastgrpo.matching_loss_backward.default, torch.ops.fastgrpo.matching_loss.default
    torch.library.opcheck(backward, (torch.ones(7, 3, device=device), v, *rest), test_utils=checks)
    torch.library.opcheck(forward, (v.mT.contiguous().mT.requires_grad_(), *rest), test_utils=checks)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_compiles_into_one_graph_with_its_gradient(variant: dict[str, Any], device: str) -> None:
    arguments = make(3, 2, 5, device=device, **variant)
    v = arguments["v"].requires_grad_()

    def loss(**arguments: Any) -> Tensor:
        errors = matching_loss(**arguments)
        return (errors.plus / errors.abs_plus + errors.minus / errors.abs_minus + errors.reference).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    result, expected = compiled(**arguments), loss(**arguments)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(torch.autograd.grad(result, v), torch.autograd.grad(expected, v))


def test_wrong_input_is_refused_with_the_remedy() -> None:
    arguments = make(3, 2, 5)
    zeros, wanted, ids = torch.zeros(3, 2, 5), torch.zeros(3, 2, 5, requires_grad=True), torch.arange(2)
    for change, message in (
        ({"v": torch.zeros(3)}, r"v must be \[B, ...\] with elements, got \(3,\); add a batch dimension"),
        ({"v_old": torch.zeros(3, 2, 4)}, r"v_old is \(3, 2, 4\) .* v \(3, 2, 5\) .*; pass the same shape and device"),
        ({"v_reference": torch.zeros(2, 2, 5)}, r"v_reference is \(2, 2, 5\) .*; pass the same shape"),
        ({"x_0": zeros.to("meta")}, r"x_0 is \(3, 2, 5\) on meta and v .* on cpu; pass the same shape and device"),
        ({"x_0": zeros.long()}, "x_0 must be floating point, got torch.int64; cast it"),
        ({"noise": torch.zeros(3, 10)}, r"noise is \(3, 10\) .*; pass the same shape"),
        ({"noise": PhiloxNoise(0, 0, ids, ids)}, r"noise has 2 ids on cpu and v is \(3, 2, 5\) on cpu; give every"),
        ({"v_old": wanted}, r"matching_loss is differentiable in v only and v_old requires .*; pass v_old.detach\(\)"),
        ({"x_0": wanted}, r"x_0 requires a gradient; pass x_0.detach\(\)"),
        ({"noise": wanted}, r"noise requires a gradient; pass noise.detach\(\)"),
        ({"v_reference": wanted}, r"v_reference requires a gradient; pass v_reference.detach\(\)"),
        ({"beta": 0.0}, "beta must be positive and finite, got 0.0; DiffusionNFT takes 0.1 to 1"),
        ({"beta": -1.0}, "beta must be positive and finite, got -1.0"),
        ({"beta": float("inf")}, "beta must be positive and finite, got inf"),
        ({"beta": float("nan")}, "beta must be positive and finite, got nan"),
        (
            {"v": GuidedVelocity(zeros, zeros, 2.0)},
            "v is guided and the loss trains the conditional branch alone; pass",
        ),
        ({"v_old": GuidedVelocity(zeros, zeros, 2.0)}, "v_old is guided .*; pass its conditional"),
        ({"v_reference": GuidedVelocity(zeros, zeros, 2.0)}, "v_reference is guided .*; pass its conditional"),
    ):
        with pytest.raises(ValueError, match=message):
            matching_loss(**{**arguments, **change})
