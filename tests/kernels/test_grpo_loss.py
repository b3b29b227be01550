"""The clipped loss and its statistics: values, gradients, and the kernels."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastgrpo_kernels import GRPOStats, grpo_loss
from fastgrpo_kernels.grpo_loss import (
    _grpo_loss_backward_triton,
    _grpo_loss_triton,
    grpo_loss_backward_reference,
    grpo_loss_reference,
)
from tests.kernels.parameters import ALL_CHECKS, BACKEND, DEVICES, DTYPES, QUICK_CHECKS, covering

# arithmetic is float64: results and gradients differ by one rounding
TOLERANCES: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {"rtol": 3e-7, "atol": 1e-7},
    torch.float16: {"rtol": 1e-3, "atol": 1e-7},
    torch.bfloat16: {"rtol": 8e-3, "atol": 1e-7},
}
SIZES = [1, 7, 2048, 2049, 5001]
CLIP, KL_COEF = 0.1, 0.04
NAN, INF = math.nan, math.inf


def make_batch(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
    """The tensors of `grpo_loss` by name, in its order; a third of the ratios lies outside 1 ± CLIP."""
    generator = torch.Generator().manual_seed(0)
    old, change, advantage = (torch.randn(shape, generator=generator) for _ in range(3))
    kl = torch.rand(shape, generator=generator)
    batch = {"log_prob": old + 0.1 * change, "old_log_prob": old, "advantage": advantage, "kl": kl}
    return {name: value.to(dtype).to(device) for name, value in batch.items()}


def published_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, kl: Tensor, clip_range: float, kl_coef: float
) -> Tensor:
    ratio = torch.exp(log_prob - old_log_prob)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return (torch.maximum(-advantage * ratio, -advantage * clipped) + kl_coef * kl).mean()


@pytest.mark.parametrize("device", DEVICES)
def test_values_by_hand(device: str) -> None:
    log_ratio = torch.tensor([0.0, math.log(2), math.log(2), math.log(0.25)], device=device)
    advantage, kl = torch.tensor([3.0, 1.0, -1.0, -2.0], device=device), torch.tensor([1.0, 2.0, 3.0, 4.0])
    loss, stats = grpo_loss(log_ratio, 0 * log_ratio, advantage, kl.to(device), clip_range=0.5, kl_coef=0.1)
    # on-policy, clipped from 2 to 1.5, not clipped, clipped from 0.25 to 0.5
    assert loss.item() == pytest.approx((-3 - 1.5 + 2 + 1) / 4 + 0.1 * 2.5)
    assert stats.clip_fraction.item() == 0.75
    assert stats.approx_kl.item() == pytest.approx((2 * (1 - math.log(2)) + 0.25 - 1 + math.log(4)) / 4)
    assert stats.ratio_deviation.item() == pytest.approx(1.0)
    assert stats.kl.item() == 2.5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("clip_range", [1e-5, 1e-4])
def test_a_clip_range_of_some_float32_steps_is_resolved(clip_range: float, device: str) -> None:
    # float32 neighbours of -1: 2^-24 apart above and twice that below
    steps = torch.arange(-2000, 2001, 7)
    log_prob = torch.full((len(steps),), -1).float().view(torch.int32).add(steps.int()).view(torch.float32)
    old = torch.full_like(log_prob, -1.0)
    _, stats = grpo_loss(log_prob.to(device), old.to(device), torch.ones_like(old).to(device), clip_range=clip_range)
    deviations = [abs(math.exp(value + 1.0) - 1.0) for value in log_prob.tolist()]
    assert stats.clip_fraction.item() == pytest.approx(sum(d > clip_range for d in deviations) / len(steps), rel=1e-7)
    assert stats.ratio_deviation.item() == pytest.approx(max(deviations), rel=1e-7)


@pytest.mark.parametrize("device", DEVICES)
def test_on_policy_the_ratio_is_exactly_one(device: str) -> None:
    batch = make_batch(999, device=device)
    batch["old_log_prob"] = batch["log_prob"] = batch["log_prob"] * 100
    loss, stats = grpo_loss(**batch, clip_range=1e-5, kl_coef=KL_COEF)
    assert (stats.ratio_deviation.item(), stats.clip_fraction.item(), stats.approx_kl.item()) == (0, 0, 0)
    expected = -batch["advantage"].double().mean() + KL_COEF * batch["kl"].double().mean()
    torch.testing.assert_close(loss, expected.float(), **TOLERANCES[torch.float32])


@pytest.mark.parametrize(("size", "dtype", "with_kl"), covering([*SIZES, 0], DTYPES, [False, True]), ids=str)
@pytest.mark.usefixtures("poisoned_outputs")
def test_kernels_equal_their_references(size: int, dtype: torch.dtype, with_kl: bool, kernel_device: str) -> None:
    log_prob, old, advantage, kl = make_batch(size, dtype=dtype, device=kernel_device).values()
    arguments = (log_prob, old, advantage, kl if with_kl else None, CLIP, KL_COEF)
    results, expected = _grpo_loss_triton(*arguments), grpo_loss_reference(*arguments)
    torch.testing.assert_close(results, expected, **TOLERANCES[torch.float32])
    backward = (torch.tensor(0.7, device=kernel_device), log_prob, old, advantage, CLIP)
    grad, expected_grad = _grpo_loss_backward_triton(*backward), grpo_loss_backward_reference(*backward)
    assert grad.dtype == dtype
    torch.testing.assert_close(grad, expected_grad, **TOLERANCES[dtype])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kl_coef", [0.0, KL_COEF])
@pytest.mark.parametrize("shape", [(1,), (7,), (2049,), (3, 5), ()], ids=str)
def test_loss_and_gradients_are_those_of_autograd_through_the_formula(
    shape: tuple[int, ...], kl_coef: float, device: str
) -> None:
    batch = make_batch(*shape, device=device)
    inputs = [batch["log_prob"].requires_grad_(), batch["kl"].requires_grad_()]
    loss, stats = grpo_loss(**batch, clip_range=CLIP, kl_coef=kl_coef)
    doubles = {name: value.double() for name, value in batch.items()}
    expected = published_loss(**doubles, clip_range=CLIP, kl_coef=kl_coef)
    torch.testing.assert_close(loss, expected.float(), **TOLERANCES[torch.float32])
    grads, expected_grads = (torch.autograd.grad(value.exp(), inputs) for value in (loss, expected))
    torch.testing.assert_close(grads, expected_grads, **TOLERANCES[torch.float32])
    assert not any(value.requires_grad for value in stats)


@pytest.mark.parametrize("log_ratio", [math.log(1.5), math.log(0.5)])
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
def test_a_ratio_on_the_border_has_its_whole_gradient(log_ratio: float, advantage: float) -> None:
    assert math.exp(log_ratio) in (0.5, 1.5)
    log_prob = torch.tensor([log_ratio], dtype=torch.float64, requires_grad=True)
    old, advantage_1 = torch.zeros(1), torch.tensor([advantage])
    loss, stats = grpo_loss(log_prob, old, advantage_1, clip_range=0.5)
    assert stats.clip_fraction.item() == 0
    (grad,) = torch.autograd.grad(loss, log_prob)
    assert grad.item() == loss.item() == -advantage * math.exp(log_ratio)
    # a GPU's exp may round to the other side of the border
    if not torch.cuda.is_available():
        kernel = _grpo_loss_backward_triton(torch.ones(()), log_prob.detach(), old, advantage_1, 0.5)
        assert kernel.item() == grad.item()


@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize(
    "broken", [{"log_prob": INF}, {"log_prob": -INF}, {"log_prob": NAN}, {"old_log_prob": INF}, {"old_log_prob": -INF}]
)
@pytest.mark.usefixtures("poisoned_outputs")
def test_a_log_prob_that_is_not_finite_is_never_hidden_by_clipping(
    broken: dict[str, float], advantage: float, kernel_device: str
) -> None:
    batch = make_batch(5, device=kernel_device)
    batch["advantage"][2] = advantage
    for name, value in broken.items():
        batch[name][2] = value
    log_prob, old, advantages, kl = batch.values()
    one = torch.ones((), device=kernel_device)
    for forward, backward in (
        (_grpo_loss_triton, _grpo_loss_backward_triton),
        (grpo_loss_reference, grpo_loss_backward_reference),
    ):
        loss, stats = forward(log_prob, old, advantages, kl, CLIP, KL_COEF)
        assert loss.isnan()
        assert stats.isnan().tolist() == [False, True, True, False]
        assert backward(one, log_prob, old, advantages, CLIP).isnan().tolist() == [i == 2 for i in range(5)]


@pytest.mark.parametrize("broken", [{"advantage": NAN}, {"advantage": INF}, {"kl": NAN}, {"kl": INF}])
@pytest.mark.parametrize("kl_coef", [0.0, KL_COEF])
def test_other_inputs_that_are_not_finite_reach_the_loss(
    broken: dict[str, float], kl_coef: float, kernel_device: str
) -> None:
    batch = make_batch(5, device=kernel_device)
    for name, value in broken.items():
        batch[name][2] = value
    log_prob, old, advantage, kl = batch.values()
    for forward in (_grpo_loss_triton, grpo_loss_reference):
        loss, _ = forward(log_prob, old, advantage, kl, CLIP, kl_coef)
        assert not loss.isfinite()


@pytest.mark.parametrize("device", DEVICES)
def test_the_loss_of_no_samples_is_zero_and_differentiable(device: str) -> None:
    batch = make_batch(0, device=device)
    log_prob, kl = batch["log_prob"].requires_grad_(), batch["kl"].requires_grad_()
    loss, stats = grpo_loss(**batch, clip_range=CLIP, kl_coef=KL_COEF)
    assert loss.item() == 0
    assert [value.item() for value in stats] == [0, 0, 0, 0]
    assert [grad.shape for grad in torch.autograd.grad(loss, [log_prob, kl])] == [(0,), (0,)]


@pytest.mark.parametrize("device", DEVICES)
def test_layout_does_not_matter(device: str) -> None:
    batch = make_batch(6, 4, device=device)
    strided = {name: value.mT.contiguous().mT for name, value in batch.items()}
    strided["advantage"] = batch["advantage"] = batch["advantage"][:, :1].expand(6, 4)
    grads = []
    for one in (batch, strided):
        log_prob = one["log_prob"] = one["log_prob"].requires_grad_()
        loss, stats = grpo_loss(**one, clip_range=CLIP, kl_coef=KL_COEF)
        grads.append([loss, *stats, *torch.autograd.grad(loss, log_prob)])
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_kernels_take_any_layout(kernel_device: str) -> None:
    contiguous = make_batch(5, device=kernel_device)
    strided = {name: value.repeat_interleave(2)[::2] for name, value in contiguous.items()}
    one, results = torch.ones((), device=kernel_device), []
    for batch in (contiguous, strided):
        log_prob, old, advantage, kl = batch.values()
        grad_B = _grpo_loss_backward_triton(one, log_prob, old, advantage, CLIP)
        results.append([*_grpo_loss_triton(log_prob, old, advantage, kl, CLIP, KL_COEF), grad_B])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("with_kl", [False, True], ids=["no kl", "kl"])
def test_operators_are_well_formed(with_kl: bool, device: str) -> None:
    # the gradient's dtype differs from that of the results only where log_prob is not float32
    log_prob, old, advantage, kl = make_batch(10, dtype=torch.bfloat16, device=device).values()
    backward = torch.ones((), device=device), log_prob[::2], old[::2], advantage[::2], CLIP
    checks = ALL_CHECKS if with_kl else QUICK_CHECKS
    torch.library.opcheck(torch.ops.fastgrpo.grpo_loss_backward.default, backward, test_utils=checks)
    kl_B = kl[::2].requires_grad_() if with_kl else None
    forward = log_prob[::2].requires_grad_(), old[::2], advantage[::2], kl_B, CLIP, KL_COEF
    torch.library.opcheck(torch.ops.fastgrpo.grpo_loss.default, forward, test_utils=checks)


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_into_one_graph_with_its_gradients(device: str) -> None:
    batch = make_batch(3, 5, device=device)
    inputs = [batch["log_prob"].requires_grad_(), batch["kl"].requires_grad_()]

    def loss_and_stats(**batch: Tensor) -> tuple[Tensor, GRPOStats]:
        loss, stats = grpo_loss(**batch, clip_range=CLIP, kl_coef=KL_COEF)
        return 2 * loss, stats

    results, expected = torch.compile(loss_and_stats, fullgraph=True, backend=BACKEND)(**batch), loss_and_stats(**batch)
    torch.testing.assert_close([results[0], *results[1]], [expected[0], *expected[1]])
    torch.testing.assert_close(*(torch.autograd.grad(loss, inputs) for loss, _ in (results, expected)))


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu() -> None:
    batch = make_batch(5000, device="cuda")
    batch["log_prob"].requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, _ = grpo_loss(**batch, clip_range=CLIP, kl_coef=KL_COEF)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@given(log_ratio=st.floats(-1, 1), advantage=st.floats(-5, 5), clip_range=st.floats(1e-5, 0.9))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_clipping_only_raises_the_loss_and_then_takes_its_slope(
    log_ratio: float, advantage: float, clip_range: float
) -> None:
    log_prob = torch.tensor([log_ratio], dtype=torch.float64, requires_grad=True)
    advantage_1 = torch.tensor([advantage])
    loss, stats = grpo_loss(log_prob, torch.zeros(1), advantage_1, clip_range=clip_range)
    (slope,) = torch.autograd.grad(loss, log_prob)
    unclipped = (-advantage_1.double() * log_prob.detach().exp()).float()
    assert loss >= unclipped
    if loss > unclipped:
        assert slope.item() == 0
    if stats.clip_fraction == 0:
        assert loss == unclipped
        assert slope.item() == pytest.approx(unclipped.item(), rel=1e-6)
    assert stats.approx_kl >= -1e-15


def test_wrong_input_is_refused_with_the_remedy() -> None:
    arguments = {**make_batch(3), "clip_range": CLIP, "kl_coef": KL_COEF}
    for change, message in (
        ({"clip_range": 0.0}, r"clip_range must lie in \(0, 1\), got 0.0; flow models take"),
        ({"clip_range": 1.0}, r"clip_range must lie in \(0, 1\), got 1.0"),
        ({"kl_coef": -1.0}, r"kl_coef must be finite and not negative, got -1.0; use 0"),
        ({"kl_coef": INF}, r"kl_coef must be finite and not negative, got inf"),
        ({"kl": None}, r"kl is missing and kl_coef is 0.04; pass the divergence of each sample, or kl_coef=0"),
        ({"kl": torch.zeros(2)}, r"kl is \(2,\) on cpu and log_prob \(3,\) .*; pass the same shape"),
        ({"advantage": torch.zeros(3, 1)}, r"advantage is \(3, 1\) on cpu and log_prob \(3,\)"),
        ({"old_log_prob": torch.zeros(3, device="meta")}, r"old_log_prob is \(3,\) on meta and log_prob .* on cpu"),
        ({"advantage": torch.zeros(3, dtype=torch.int64)}, "advantage must be floating point, got torch.int64; cast"),
        ({"log_prob": torch.zeros(3, dtype=torch.bool)}, "log_prob must be floating point, got torch.bool"),
        ({"old_log_prob": torch.zeros(3, requires_grad=True)}, r"old_log_prob requires .*; pass old_log_prob.detach"),
        ({"advantage": torch.zeros(3, requires_grad=True)}, r"advantage requires a gradient; pass advantage.detach"),
    ):
        with pytest.raises(ValueError, match=message):
            grpo_loss(**{**arguments, **change})  # type: ignore[arg-type]
