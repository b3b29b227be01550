"""GRPO's clipped loss with its statistics in one pass, and nothing that waits for the GPU.

    ratio = exp(log_prob - old_log_prob)
    loss  = mean over B of max(-A ratio, -A clip(ratio, 1 - clip_range, 1 + clip_range)) + kl_coef * mean of kl

PPO's surrogate (arXiv:1707.06347) with the penalty of GRPO (arXiv:2402.03300) and Flow-GRPO (arXiv:2505.05470).  The
clip range of a flow model is 1e-4 or 1e-5, some hundred float32 steps beside 1, and a GPU's float32 exp is off by a
few: all arithmetic is float64, so the ratio is exactly 1 where the log-probabilities are equal.
Differentiable in log_prob and kl.  Letter: B samples.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgrpo_kernels.op import define_op

# samples that the forward program takes at a time, and that one backward program handles
BLOCK = 2048
BACKWARD_BLOCK = 256


class GRPOStats(NamedTuple):
    """float32 scalars without gradient, left on the device: reading one waits for it.  0 of no samples."""

    # share of samples whose ratio is not within 1 ± clip_range
    clip_fraction: Tensor
    # mean of ratio - 1 - log(ratio), an estimate of KL(old policy, policy) on the scale of log_prob
    approx_kl: Tensor
    # max of |ratio - 1|
    ratio_deviation: Tensor
    # mean of kl_B; 0 without it
    kl: Tensor


def _log_ratio_reference(log_prob_B: Tensor, old_log_prob_B: Tensor) -> Tensor:
    log_ratio_B = log_prob_B.double() - old_log_prob_B.double()
    # an infinite log_prob makes a ratio of 0 or infinity, which clipping would hide
    return torch.where(log_ratio_B.isfinite(), log_ratio_B, torch.nan)


def grpo_loss_reference(
    log_prob_B: Tensor,
    old_log_prob_B: Tensor,
    advantage_B: Tensor,
    kl_B: Tensor | None,
    clip_range: float,
    kl_coef: float,
) -> tuple[Tensor, Tensor]:
    """The operator on the CPU and under tracing, and what the tests compare the kernel with: loss and stats [4]."""
    B = log_prob_B.shape[0]
    if B == 0:
        return log_prob_B.new_zeros((), dtype=torch.float32), log_prob_B.new_zeros(4, dtype=torch.float32)
    log_ratio_B = _log_ratio_reference(log_prob_B, old_log_prob_B)
    ratio_B, advantage_B = log_ratio_B.exp(), advantage_B.double()
    clipped_B = ratio_B.clamp(1.0 - clip_range, 1.0 + clip_range)
    surrogate = torch.maximum(-advantage_B * ratio_B, -advantage_B * clipped_B).mean()
    deviation_B = (ratio_B - 1.0).abs()
    outside = (~(deviation_B <= clip_range)).double().mean()
    approx_kl = (ratio_B - 1.0 - log_ratio_B).mean()
    kl = torch.zeros_like(surrogate) if kl_B is None else kl_B.double().mean()
    return (surrogate + kl_coef * kl).float(), torch.stack([outside, approx_kl, deviation_B.max(), kl]).float()


def grpo_loss_backward_reference(
    grad_loss: Tensor, log_prob_B: Tensor, old_log_prob_B: Tensor, advantage_B: Tensor, clip_range: float
) -> Tensor:
    """The gradient with respect to log_prob_B: none where clipping raised the loss, all of it at a tie."""
    ratio_B, advantage_B = _log_ratio_reference(log_prob_B, old_log_prob_B).exp(), advantage_B.double()
    unclipped_B = -advantage_B * ratio_B
    clipped_B = -advantage_B * ratio_B.clamp(1.0 - clip_range, 1.0 + clip_range)
    slope_B = torch.where(clipped_B > unclipped_B, 0.0, unclipped_B)
    return (grad_loss.double() / log_prob_B.shape[0] * slope_B).to(log_prob_B.dtype)


@triton.jit
def _load(ptr, cols, mask):
    return tl.load(ptr + cols, mask=mask, other=0.0).to(tl.float64)


@triton.jit
def _log_ratio_kernel(log_prob_ptr, old_log_prob_ptr, cols, mask):
    log_ratio = _load(log_prob_ptr, cols, mask) - _load(old_log_prob_ptr, cols, mask)
    return tl.where(tl.abs(log_ratio) < float("inf"), log_ratio, float("nan"))


@triton.jit
def _surrogates_kernel(ratio, advantage, clip_range):
    """Unclipped and clipped; NaN fails every comparison, so it stays NaN."""
    # clip_range is a float32 argument; rounding it moves the borders by 6e-8 of itself, rounding them by 6e-8 of 1
    one = tl.full([], 1.0, tl.float64)
    low, high = one - clip_range, one + clip_range
    clipped_ratio = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))
    return -advantage * ratio, -advantage * clipped_ratio


@triton.jit
def _grpo_loss_kernel(
    log_prob_ptr, old_log_prob_ptr, advantage_ptr, kl_ptr, loss_ptr, stats_ptr, clip_range, kl_coef, B,
    HAS_KL: tl.constexpr, NUM_CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program; a lane without a sample has ratio 1, advantage 0 and kl 0, which add nothing to any sum."""
    lanes = tl.arange(0, BLOCK)
    surrogate_sum = tl.zeros([BLOCK], tl.float64)
    approx_kl_sum = tl.zeros([BLOCK], tl.float64)
    kl_sum = tl.zeros([BLOCK], tl.float64)
    deviation_max = tl.zeros([BLOCK], tl.float64)
    num_outside = tl.zeros([BLOCK], tl.int32)
    for chunk in range(NUM_CHUNKS):
        cols = chunk * BLOCK + lanes
        mask = cols < B
        log_ratio = _log_ratio_kernel(log_prob_ptr, old_log_prob_ptr, cols, mask)
        ratio = tl.exp(log_ratio)
        unclipped, clipped = _surrogates_kernel(ratio, _load(advantage_ptr, cols, mask), clip_range)
        surrogate_sum += tl.where(clipped > unclipped, clipped, unclipped)
        approx_kl_sum += ratio - 1.0 - log_ratio
        deviation = tl.abs(ratio - 1.0)
        deviation_max = tl.where(deviation > deviation_max, deviation, deviation_max)
        num_outside += tl.where(deviation <= clip_range, 0, 1)
        if HAS_KL:
            kl_sum += _load(kl_ptr, cols, mask)
    count = tl.maximum(B, 1)
    kl = tl.sum(kl_sum) / count
    loss = tl.sum(surrogate_sum) / count + kl_coef * kl
    approx_kl = tl.sum(approx_kl_sum) / count
    # max drops NaN; a mean of numbers that are not negative is NaN only if one of them is
    deviation = tl.where(approx_kl == approx_kl, tl.max(deviation_max, axis=0), approx_kl)
    tl.store(loss_ptr, loss.to(tl.float32))
    tl.store(stats_ptr, (tl.sum(num_outside).to(tl.float64) / count).to(tl.float32))
    tl.store(stats_ptr + 1, approx_kl.to(tl.float32))
    tl.store(stats_ptr + 2, deviation.to(tl.float32))
    tl.store(stats_ptr + 3, kl.to(tl.float32))


@triton.jit
def _grpo_loss_backward_kernel(
    grad_loss_ptr, log_prob_ptr, old_log_prob_ptr, advantage_ptr, grad_ptr, clip_range, B, BLOCK: tl.constexpr
):  # fmt: skip
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < B
    ratio = tl.exp(_log_ratio_kernel(log_prob_ptr, old_log_prob_ptr, cols, mask))
    unclipped, clipped = _surrogates_kernel(ratio, _load(advantage_ptr, cols, mask), clip_range)
    grad = tl.load(grad_loss_ptr).to(tl.float64) / B * tl.where(clipped > unclipped, 0.0, unclipped)
    tl.store(grad_ptr + cols, grad.to(grad_ptr.dtype.element_ty), mask=mask)


def _grpo_loss_triton(
    log_prob_B: Tensor,
    old_log_prob_B: Tensor,
    advantage_B: Tensor,
    kl_B: Tensor | None,
    clip_range: float,
    kl_coef: float,
) -> tuple[Tensor, Tensor]:
    B, log_prob_B = log_prob_B.shape[0], log_prob_B.contiguous()
    loss = torch.empty((), dtype=torch.float32, device=log_prob_B.device)
    stats = torch.empty(4, dtype=torch.float32, device=log_prob_B.device)
    # a power of two, so that few numbers of samples need a compilation of their own
    num_chunks = triton.next_power_of_2(max(triton.cdiv(B, BLOCK), 1))
    _grpo_loss_kernel[(1,)](
        log_prob_B, old_log_prob_B.contiguous(), advantage_B.contiguous(),
        log_prob_B if kl_B is None else kl_B.contiguous(), loss, stats, clip_range, kl_coef, B,
        HAS_KL=kl_B is not None, NUM_CHUNKS=num_chunks, BLOCK=BLOCK, num_warps=32,
    )  # fmt: skip
    return loss, stats


def _grpo_loss_backward_triton(
    grad_loss: Tensor, log_prob_B: Tensor, old_log_prob_B: Tensor, advantage_B: Tensor, clip_range: float
) -> Tensor:
    B, log_prob_B = log_prob_B.shape[0], log_prob_B.contiguous()
    grad_B = torch.empty_like(log_prob_B)
    _grpo_loss_backward_kernel[(triton.cdiv(B, BACKWARD_BLOCK),)](
        grad_loss, log_prob_B, old_log_prob_B.contiguous(), advantage_B.contiguous(), grad_B, clip_range, B,
        BLOCK=BACKWARD_BLOCK,
    )  # fmt: skip
    return grad_B


_grpo_loss = define_op("grpo_loss", triton=_grpo_loss_triton, reference=grpo_loss_reference)
grpo_loss_backward = define_op(
    "grpo_loss_backward", triton=_grpo_loss_backward_triton, reference=grpo_loss_backward_reference
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    log_prob_B, old_log_prob_B, advantage_B, kl_B, ctx.clip_range, ctx.kl_coef = inputs
    ctx.kl_dtype = None if kl_B is None else kl_B.dtype
    ctx.save_for_backward(log_prob_B, old_log_prob_B, advantage_B)


def _backward(ctx: Any, grad_loss: Tensor, grad_stats: Tensor) -> tuple[Tensor | None, ...]:
    log_prob_B, old_log_prob_B, advantage_B = ctx.saved_tensors
    grad_log_prob_B = grad_kl_B = None
    if ctx.needs_input_grad[0]:
        grad_log_prob_B = grpo_loss_backward(grad_loss, log_prob_B, old_log_prob_B, advantage_B, ctx.clip_range)
    if ctx.needs_input_grad[3]:
        grad_kl_B = (grad_loss * (ctx.kl_coef / max(log_prob_B.shape[0], 1))).to(ctx.kl_dtype).expand_as(log_prob_B)
    return grad_log_prob_B, None, None, grad_kl_B, None, None


_grpo_loss.register_autograd(_backward, setup_context=_setup_context)


def grpo_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    kl: Tensor | None = None,
    *,
    clip_range: float,
    kl_coef: float = 0.0,
) -> tuple[Tensor, GRPOStats]:
    """The mean loss, a float32 scalar with gradients to log_prob and kl, and its statistics.

    The tensors are of one shape, any shape, layout and floating dtype; all their elements count alike.  A sample gets
    gradient unless clipping raised its loss, so also on the border.  An input that is not finite makes a loss that is
    not finite.  The loss of no samples is 0: a rank that holds none can call it.  Raises ValueError for shapes, dtypes
    or devices that differ, for a clip_range outside (0, 1), a negative kl_coef or one without kl, and for a gradient
    wanted elsewhere.
    """
    if not 0 < clip_range < 1:
        raise ValueError(f"clip_range must lie in (0, 1), got {clip_range}; flow models take 1e-5 to 1e-3")
    if not 0 <= kl_coef < float("inf"):
        raise ValueError(f"kl_coef must be finite and not negative, got {kl_coef}; use 0 for no penalty")
    if kl is None and kl_coef > 0:
        raise ValueError(f"kl is missing and kl_coef is {kl_coef}; pass the divergence of each sample, or kl_coef=0")
    _check_tensors(log_prob, old_log_prob=old_log_prob, advantage=advantage, **({} if kl is None else {"kl": kl}))
    loss, stats = _grpo_loss(
        log_prob.flatten(), old_log_prob.flatten(), advantage.flatten(), None if kl is None else kl.flatten(),
        float(clip_range), float(kl_coef),
    )  # fmt: skip
    return loss, GRPOStats(*stats.detach().unbind())


def _check_tensors(log_prob: Tensor, **others: Tensor) -> None:
    for name, tensor in {"log_prob": log_prob, **others}.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}; cast it to float32")
        if tensor.shape != log_prob.shape or tensor.device != log_prob.device:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} on {tensor.device} and log_prob {tuple(log_prob.shape)} on "
                f"{log_prob.device}; pass the same shape and device"
            )
        if name in ("old_log_prob", "advantage") and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"grpo_loss is differentiable in log_prob and kl and {name} requires a gradient; pass {name}.detach()"
            )
