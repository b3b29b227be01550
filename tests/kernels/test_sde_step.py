"""One reverse step: its values, its noise, its log-probability, its gradient, and the kernel."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgrpo_kernels import GuidedVelocity, PhiloxNoise, combined, ode_step, philox_normal, sde_log_prob, sde_step
from fastgrpo_kernels.guidance import branches
from fastgrpo_kernels.noise import noise_arguments
from fastgrpo_kernels.sde_step import _sde_step_triton, sde_step_reference
from tests.kernels.parameters import ALL_CHECKS, DEVICES, DTYPES, QUICK_CHECKS, covering

MakeStep = Callable[..., dict[str, Any]]
# x_next is exact: every product and sum is rounded alike; log_prob is a float64 sum, rounded once
LOG_PROB_TOLERANCE: dict[str, Any] = {"rtol": 3e-7, "atol": 1e-7}
# one element, odd, exactly one block, one past it, a latent, tokens, no sample
SHAPES = [(3, 1), (2, 7), (2, 1024), (3, 1025), (2, 16, 8, 8), (2, 65, 16), (0, 4, 2)]
VARIANTS = [
    {"guided": guided, "drawn": drawn, "log_prob": kind, "return_mean": return_mean}
    for guided, drawn, kind, return_mean in (
        (False, False, "gaussian", False),
        (True, False, "cps", True),
        (False, True, "cps", False),
        (True, True, "gaussian", True),
    )
]


def name_of(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    return "-".join(name if on is True else on for name, on in value.items() if on)


def op_arguments(step: dict[str, Any], log_prob: str = "gaussian", return_mean: bool = False) -> tuple[Any, ...]:
    """Those of the operator, from those of the public function."""
    v, v_uncond, scale = branches("v", step["v"])
    coefficients = [step[name] for name in ("c_x", "c_v", "std")]
    noise = noise_arguments("x", step["x"], step["noise"])
    return (step["x"], v, v_uncond, scale, *noise, *coefficients, log_prob == "gaussian", return_mean)


def normal(step: dict[str, Any]) -> torch.distributions.Normal:
    """The step's distribution, by PyTorch's own formulas."""
    column = (-1, *[1] * (step["x"].dim() - 1))
    mean = step["c_x"].view(column) * step["x"].float() + step["c_v"].view(column) * combined(step["v"])
    return torch.distributions.Normal(mean, step["std"].view(column))


def test_step_by_hand() -> None:
    x, v, noise = torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, -2.0]]), torch.tensor([[3.0, -1.0]])
    x_next, log_prob_B, mean = sde_step(x, v, noise, 0.5, 0.25, 2.0, log_prob="cps", return_mean=True)
    # mean = (1.5, 0.5), x_next - mean = (6, -2), mean square 20
    assert x_next.tolist() == [[7.5, -1.5]]
    assert log_prob_B.tolist() == [-20]
    assert mean is not None
    assert mean.tolist() == [[1.5, 0.5]]
    # -20 / (2 * 4) - log(2) - log(2 pi) / 2
    assert sde_step(x, v, noise, 0.5, 0.25, 2.0).log_prob_B.tolist() == pytest.approx([-2.5 - 0.6931472 - 0.9189385])
    # v_u + 3 (v_c - v_u) with v_u = 0 is 3 v: mean = (3.5, -0.5)
    guided = sde_step(x, GuidedVelocity(v, torch.zeros_like(v), 3.0), noise, 0.5, 0.25, 2.0)
    assert guided.x_next.tolist() == [[9.5, -2.5]]
    assert guided.mean is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("guided", [False, True])
def test_log_prob_is_the_normal_density_of_the_stored_value(
    make_step: MakeStep, dtype: torch.dtype, guided: bool
) -> None:
    step = make_step(3, 4, 5, 5, dtype=dtype, guided=guided)
    x_next, log_prob_B, _ = sde_step(**step)
    assert x_next.dtype == dtype
    density = normal(step).log_prob(x_next.float()).mean(dim=(1, 2, 3))
    torch.testing.assert_close(log_prob_B, density, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(6, 16, 8, 8), (6, 65, 16), (6, 7)], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_drawn_noise_is_that_of_philox_normal_bit_for_bit(
    make_step: MakeStep, shape: tuple[int, ...], device: str
) -> None:
    step = make_step(*shape, device=device)
    prompt_ids, sample_ids = torch.tensor([4, 9], device=device), torch.arange(3, device=device)
    given = philox_normal(7, 1003, prompt_ids, sample_ids, step["x"][0].numel()).view(shape)
    drawn = PhiloxNoise(7, 1003, prompt_ids.repeat_interleave(3), sample_ids.repeat(2))
    for result, expected in zip(
        sde_step(**{**step, "noise": drawn})[:2], sde_step(**{**step, "noise": given})[:2], strict=True
    ):
        assert torch.equal(result, expected)
    # rows of a noise are the noise of these rows, whatever the batch
    rows = slice(2, 5)
    part = {name: value[rows] for name, value in {**step, "noise": drawn}.items()}
    assert torch.equal(sde_step(**part).x_next, sde_step(**{**step, "noise": given}).x_next[rows])


@pytest.mark.parametrize(("shape", "dtype", "variant"), covering(SHAPES, DTYPES, VARIANTS), ids=name_of)
@pytest.mark.usefixtures("poisoned_outputs")
def test_kernel_equals_reference(
    make_step: MakeStep, shape: tuple[int, ...], dtype: torch.dtype, variant: dict[str, Any], kernel_device: str
) -> None:
    step = make_step(*shape, dtype=dtype, device=kernel_device, guided=variant["guided"], drawn=variant["drawn"])
    arguments = op_arguments(step, variant["log_prob"], variant["return_mean"])
    x_next, log_prob_B, mean = _sde_step_triton(*arguments)
    x_next_expected, log_prob_B_expected, mean_expected = sde_step_reference(*arguments)
    assert torch.equal(x_next, x_next_expected)
    assert torch.equal(mean, mean_expected)
    # a sum in float64 rounds to one float32 in any order; logarithms may differ
    exact = {"rtol": 0, "atol": 0}
    tolerance = LOG_PROB_TOLERANCE if variant["log_prob"] == "gaussian" else exact
    torch.testing.assert_close(log_prob_B, log_prob_B_expected, **tolerance)


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "strided"])
def test_layout_of_the_inputs_does_not_matter(make_step: MakeStep, layout: str, kernel_device: str) -> None:
    step = make_step(3, 4, 6, 5, device=kernel_device, guided=True)

    def lay_out(x: Tensor) -> Tensor:
        if layout == "channels_last":
            return x.contiguous(memory_format=torch.channels_last)
        if layout == "transposed":
            return x.transpose(1, 3).contiguous().transpose(1, 3)
        return torch.stack([x, -x], dim=-1)[..., 0]

    other: dict[str, Any] = {name: lay_out(step[name]) for name in ("x", "noise")}
    other["v"] = GuidedVelocity(lay_out(step["v"].conditional), lay_out(step["v"].unconditional), step["v"].scale)
    # a coefficient may be one number expanded, or a column
    other["c_x"] = torch.stack([step["c_x"], -step["c_x"]], dim=1)[:, 0]
    assert not other["x"].is_contiguous()
    for run in (sde_step_reference, _sde_step_triton):
        for result, expected in zip(run(*op_arguments({**step, **other})), run(*op_arguments(step)), strict=True):
            assert torch.equal(result, expected)
            assert result.is_contiguous()


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
@pytest.mark.parametrize("device", DEVICES)
def test_log_prob_is_that_of_sde_log_prob_bit_for_bit(
    make_step: MakeStep, device: str, variant: dict[str, Any]
) -> None:
    step = make_step(6, 3, 700, device=device, guided=variant["guided"], drawn=variant["drawn"])
    x_next, log_prob_B, mean = sde_step(**step, log_prob=variant["log_prob"], return_mean=True)
    assert mean is not None
    assert torch.equal(mean, ode_step(step["x"], step["v"], step["c_x"], step["c_v"]))
    # one sample at a time: the batch of the update is not the batch of the rollout
    for b in range(6):
        one = slice(b, b + 1)
        v = step["v"]
        v_one = GuidedVelocity(v.conditional[one], v.unconditional[one], v.scale) if variant["guided"] else v[one]
        coefficients = [step[name][one] for name in ("c_x", "c_v", "std")]
        again_B, _ = sde_log_prob(step["x"][one], v_one, x_next[one], *coefficients, log_prob=variant["log_prob"])
        assert torch.equal(again_B, log_prob_B[one])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("guided", [False, True])
def test_gradient_flows_from_log_prob_to_v_and_x_next_is_a_sample(
    make_step: MakeStep, guided: bool, device: str
) -> None:
    step = make_step(3, 2, 9, device=device, guided=guided)
    v = (step["v"].conditional if guided else step["v"]).requires_grad_()
    x_next, log_prob_B, mean = sde_step(**step, return_mean=True)
    assert mean is not None
    assert not x_next.requires_grad
    assert not mean.requires_grad
    (grad,) = torch.autograd.grad(log_prob_B.square().sum(), v)
    (expected,) = torch.autograd.grad(normal(step).log_prob(x_next).mean(dim=(1, 2)).square().sum(), v)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_operator_is_well_formed(make_step: MakeStep, variant: dict[str, Any], device: str) -> None:
    # results are of two dtypes only where latents are not float32
    step = make_step(3, 2, 5, dtype=torch.bfloat16, device=device, guided=variant["guided"], drawn=variant["drawn"])
    x, v, *rest = op_arguments(step, variant["log_prob"], variant["return_mean"])
    v = v.mT.contiguous().mT.requires_grad_()
    checks = ALL_CHECKS if variant in (VARIANTS[0], VARIANTS[-1]) else QUICK_CHECKS
    torch.library.opcheck(torch.ops.fastgrpo.sde_step.default, (x, v, *rest), test_utils=checks)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_compiles_into_one_graph(make_step: MakeStep, variant: dict[str, Any], device: str) -> None:
    step = make_step(3, 2, 5, device=device, guided=variant["guided"], drawn=variant["drawn"])

    def doubled(**arguments: Any) -> tuple[Tensor, Tensor]:
        x_next, log_prob_B, _ = sde_step(**arguments, log_prob=variant["log_prob"])
        return 2 * x_next, 2 * log_prob_B

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    for result, expected in zip(compiled(**step), doubled(**step), strict=True):
        assert torch.equal(result, expected)


def test_numbers_and_tensors_are_the_same_coefficients(make_step: MakeStep) -> None:
    step = make_step(3, 2, 5)
    numbers = sde_step(step["x"], step["v"], step["noise"], 0.9, -0.1, 0.25)
    tensors = sde_step(step["x"], step["v"], step["noise"], *(torch.full((3,), c) for c in (0.9, -0.1, 0.25)))
    assert torch.equal(numbers.x_next, tensors.x_next)
    assert torch.equal(numbers.log_prob_B, tensors.log_prob_B)


def test_wrong_input_is_refused_with_the_remedy(make_step: MakeStep) -> None:
    step = make_step(3, 2, 5)
    zeros = torch.zeros(3, 2, 5)
    ids = torch.arange(2)
    for change, message in (
        ({"x": torch.zeros(3)}, r"x must be \[B, ...\] with elements, got \(3,\); add a batch dimension"),
        ({"v": torch.zeros(3, 2, 4)}, r"v is \(3, 2, 4\) .* x \(3, 2, 5\) .*; pass the same shape"),
        ({"v": GuidedVelocity(zeros, zeros[:2], 2.0)}, r"v.unconditional is \(2, 2, 5\) .*; pass the same shape"),
        ({"v": GuidedVelocity(zeros, zeros.clone().requires_grad_(), 2.0)}, r"v.unconditional gets no gradient"),
        ({"noise": torch.zeros(3, 2, 5, dtype=torch.int64)}, "noise must be floating point, got torch.int64; cast it"),
        ({"noise": PhiloxNoise(0, 0, ids, ids)}, r"noise has 2 ids on cpu and x is \(3, 2, 5\) on cpu; give every"),
        ({"c_x": torch.zeros(3, 1)}, r"c_x must be float32 of shape \(3,\) .*; pass a number, or one number per"),
        ({"c_v": torch.zeros(3, dtype=torch.float64)}, "c_v must be float32 .* got torch.float64"),
        ({"std": torch.zeros(3)}, r"std must be positive, got \[0.0, 0.0, 0.0\]; take a deterministic step with ode"),
        ({"std": -0.5}, "std must be positive, got -0.5; take a deterministic step with ode_step"),
        ({"log_prob": "laplace"}, "log_prob must be 'gaussian' or 'cps', got 'laplace'"),
        ({"x": step["x"].clone().requires_grad_()}, r"x requires a gradient; pass x.detach\(\)"),
        ({"x": step["x"].to("meta")}, "v is .* on cpu and x .* on meta; pass the same shape and device"),
    ):
        with pytest.raises(ValueError, match=message):
            sde_step(**{**step, **change})
    for fields, message in (
        ((-1, 0, ids, ids), r"seed must be in \[0, 2\^63\), got -1"),
        ((0, 0, ids.int(), ids), "prompt_ids_B must be int64 .*; pass torch.tensor"),
        ((0, 0, ids, ids[:1]), r"sample_ids_B must be int64 of shape \(2,\) .* got torch.int64 of shape \(1,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            PhiloxNoise(*fields)
