"""The log-probability of a stored reverse step, and its KL divergence to the reference policy, in one pass.

    mean     = c_x * x + c_v * v
    log_prob = constant - weight * mean over D of (x_next - mean)^2
    kl       = kl_weight * mean over D of (c_v * (v - v_reference))^2

Gaussian: weight = 1 / (2 std^2), constant = -log(std) - log(2 pi) / 2, kl_weight = 1 / (2 s^2), where s is Flow-GRPO's
scale, std without the length of the step (arXiv:2505.05470).  CPS as published (arXiv:2509.05952): weight 1,
constant 0.  Differentiable in v.  Letters: B samples, D latent elements of one sample.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgrpo_kernels.op import define_op
from fastgrpo_kernels.step_mean import (
    BLOCK,
    check_coefficients,
    check_no_gradient,
    check_samples,
    empty_partial_sums,
    load_row,
    mean_square_of_partial_sums,
    mean_square_reference,
    rows,
    step_mean_kernel,
    step_mean_reference,
    store_square_sum,
)


def sde_log_prob_reference(
    x: Tensor,
    v: Tensor,
    x_next: Tensor,
    c_x_B: Tensor,
    c_v_B: Tensor,
    weight_B: Tensor,
    constant_B: Tensor,
    v_reference: Tensor | None,
    kl_weight_B: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The operator on the CPU and under tracing, and what the tests compare the kernel with."""
    mean_BD = step_mean_reference(rows(x), rows(v), c_x_B, c_v_B)
    log_prob_B = constant_B - weight_B * mean_square_reference(rows(x_next).float() - mean_BD)
    if v_reference is None or kl_weight_B is None:
        return log_prob_B, torch.zeros_like(log_prob_B)
    shift_BD = c_v_B[:, None] * (rows(v).float() - rows(v_reference).float())
    return log_prob_B, kl_weight_B * mean_square_reference(shift_BD)


def sde_log_prob_backward_reference(
    grad_log_prob_B: Tensor,
    grad_kl_B: Tensor,
    x: Tensor,
    v: Tensor,
    x_next: Tensor,
    c_x_B: Tensor,
    c_v_B: Tensor,
    weight_B: Tensor,
    v_reference: Tensor | None,
    kl_weight_B: Tensor | None,
) -> Tensor:
    """The gradient with respect to v."""
    x_BD, v_BD, x_next_BD = rows(x), rows(v), rows(x_next)
    scale = 2.0 / x_BD.shape[1]
    difference_BD = x_next_BD.float() - step_mean_reference(x_BD, v_BD, c_x_B, c_v_B)
    grad_BD = (scale * grad_log_prob_B * weight_B * c_v_B)[:, None] * difference_BD
    if v_reference is not None and kl_weight_B is not None:
        kl_scale_B = scale * grad_kl_B * kl_weight_B * c_v_B * c_v_B
        grad_BD = grad_BD + kl_scale_B[:, None] * (v_BD.float() - rows(v_reference).float())
    return grad_BD.to(v.dtype).view(v.shape)


@triton.jit
def _sde_log_prob_kernel(
    x_ptr, v_ptr, x_next_ptr, c_x_ptr, c_v_ptr, v_reference_ptr, partial_ptr, kl_partial_ptr, D,
    HAS_REFERENCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < D
    mean = step_mean_kernel(x_ptr, v_ptr, c_x_ptr, c_v_ptr, row, cols, mask, D)
    difference = load_row(x_next_ptr, row, cols, mask, D) - mean
    if HAS_REFERENCE:
        shift = load_row(v_ptr, row, cols, mask, D) - load_row(v_reference_ptr, row, cols, mask, D)
        store_square_sum(kl_partial_ptr, row, tl.load(c_v_ptr + row) * shift, mask)
    # after every load: the compiler then reads v once for both
    store_square_sum(partial_ptr, row, difference, mask)


@triton.jit
def _sde_log_prob_backward_kernel(
    grad_log_prob_ptr, grad_kl_ptr, x_ptr, v_ptr, x_next_ptr, c_x_ptr, c_v_ptr, weight_ptr,
    v_reference_ptr, kl_weight_ptr, grad_v_ptr, scale, D,
    HAS_REFERENCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < D
    c_v = tl.load(c_v_ptr + row)
    mean = step_mean_kernel(x_ptr, v_ptr, c_x_ptr, c_v_ptr, row, cols, mask, D)
    difference = load_row(x_next_ptr, row, cols, mask, D) - mean
    grad = scale * tl.load(grad_log_prob_ptr + row) * tl.load(weight_ptr + row) * c_v * difference
    if HAS_REFERENCE:
        shift = load_row(v_ptr, row, cols, mask, D) - load_row(v_reference_ptr, row, cols, mask, D)
        grad += scale * tl.load(grad_kl_ptr + row) * tl.load(kl_weight_ptr + row) * c_v * c_v * shift
    tl.store(grad_v_ptr + row * D + cols, grad.to(grad_v_ptr.dtype.element_ty), mask=mask)


def _sde_log_prob_triton(
    x: Tensor,
    v: Tensor,
    x_next: Tensor,
    c_x_B: Tensor,
    c_v_B: Tensor,
    weight_B: Tensor,
    constant_B: Tensor,
    v_reference: Tensor | None,
    kl_weight_B: Tensor | None,
) -> tuple[Tensor, Tensor]:
    B, D = x.shape[0], x.numel() // x.shape[0]
    partial, v_rows = empty_partial_sums(x), rows(v)
    kl_partial = partial if v_reference is None else empty_partial_sums(x)
    _sde_log_prob_kernel[(B, triton.cdiv(D, BLOCK))](
        rows(x), v_rows, rows(x_next), c_x_B.contiguous(), c_v_B.contiguous(),
        v_rows if v_reference is None else rows(v_reference), partial, kl_partial, D,
        HAS_REFERENCE=v_reference is not None, BLOCK=BLOCK, enable_fp_fusion=False,
    )  # fmt: skip
    log_prob_B = constant_B - weight_B * mean_square_of_partial_sums(partial, D)
    if kl_weight_B is None:
        return log_prob_B, torch.zeros_like(log_prob_B)
    return log_prob_B, kl_weight_B * mean_square_of_partial_sums(kl_partial, D)


def _sde_log_prob_backward_triton(
    grad_log_prob_B: Tensor,
    grad_kl_B: Tensor,
    x: Tensor,
    v: Tensor,
    x_next: Tensor,
    c_x_B: Tensor,
    c_v_B: Tensor,
    weight_B: Tensor,
    v_reference: Tensor | None,
    kl_weight_B: Tensor | None,
) -> Tensor:
    B, D = x.shape[0], x.numel() // x.shape[0]
    v_rows = rows(v)
    weight_B = weight_B.contiguous()
    grad_v_BD = torch.empty_like(v_rows)
    _sde_log_prob_backward_kernel[(B, triton.cdiv(D, BLOCK))](
        grad_log_prob_B.contiguous(), grad_kl_B.contiguous(), rows(x), v_rows, rows(x_next),
        c_x_B.contiguous(), c_v_B.contiguous(), weight_B,
        v_rows if v_reference is None else rows(v_reference),
        weight_B if kl_weight_B is None else kl_weight_B.contiguous(), grad_v_BD, 2.0 / D, D,
        HAS_REFERENCE=v_reference is not None, BLOCK=BLOCK,
    )  # fmt: skip
    return grad_v_BD.view(v.shape)


_sde_log_prob = define_op("sde_log_prob", triton=_sde_log_prob_triton, reference=sde_log_prob_reference)
sde_log_prob_backward = define_op(
    "sde_log_prob_backward", triton=_sde_log_prob_backward_triton, reference=sde_log_prob_backward_reference
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, v, x_next, c_x_B, c_v_B, weight_B, _, v_reference, kl_weight_B = inputs
    ctx.save_for_backward(x, v, x_next, c_x_B, c_v_B, weight_B, v_reference, kl_weight_B)


def _backward(ctx: Any, grad_log_prob_B: Tensor, grad_kl_B: Tensor) -> tuple[Tensor | None, ...]:
    grad_v = sde_log_prob_backward(grad_log_prob_B, grad_kl_B, *ctx.saved_tensors)
    return None, grad_v, *[None] * 7


_sde_log_prob.register_autograd(_backward, setup_context=_setup_context)


def sde_log_prob(
    x: Tensor,
    v: Tensor,
    x_next: Tensor,
    c_x_B: Tensor,
    c_v_B: Tensor,
    weight_B: Tensor,
    constant_B: Tensor,
    v_reference: Tensor | None = None,
    kl_weight_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """log_prob_B of x_next and kl_B to the reference policy, float32; kl_B is zero without v_reference.

    x, v, x_next and v_reference are [B, ...] of any layout and floating dtype, the coefficients float32 [B].  On the
    result of `sde_step`, log_prob_B equals that op's bit for bit.  Gradients flow to v alone; ValueError for a gradient
    wanted elsewhere, for shapes, dtypes or devices that differ, and for v_reference without kl_weight_B or vice versa.
    """
    check_samples(x=x, v=v, x_next=x_next)
    check_coefficients(x, c_x_B=c_x_B, c_v_B=c_v_B, weight_B=weight_B, constant_B=constant_B)
    check_no_gradient("sde_log_prob", x=x, x_next=x_next, c_x_B=c_x_B, c_v_B=c_v_B)
    check_no_gradient("sde_log_prob", weight_B=weight_B, constant_B=constant_B)
    if (v_reference is None) != (kl_weight_B is None):
        missing = "v_reference" if v_reference is None else "kl_weight_B"
        raise ValueError(f"{missing} is missing; pass v_reference and kl_weight_B together, or neither")
    if v_reference is not None and kl_weight_B is not None:
        check_samples(x=x, v_reference=v_reference)
        check_coefficients(x, kl_weight_B=kl_weight_B)
        check_no_gradient("sde_log_prob", v_reference=v_reference, kl_weight_B=kl_weight_B)
    return _sde_log_prob(x, v, x_next, c_x_B, c_v_B, weight_B, constant_B, v_reference, kl_weight_B)
