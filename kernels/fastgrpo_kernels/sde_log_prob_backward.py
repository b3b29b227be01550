"""The gradient of `sde_log_prob`, and of the log_prob of `sde_step`, with respect to the velocity.

    d log_prob / d v = weight * 2 / D * scale * c_v * (x_next - mean)          weight = 1 / (2 std^2), or 1 for CPS
    d kl / d v       = kl_weight * 2 / D * scale * c_v^2 * (v - v_reference)

scale is that of guidance: only the conditional branch has a gradient.  Letters: B samples, D latent elements.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgrpo_kernels.guidance import guided_reference, load_row, load_velocity
from fastgrpo_kernels.op import define_op
from fastgrpo_kernels.philox import NO_FUSION
from fastgrpo_kernels.step_mean import BLOCK, rows, rows_or, step_mean_reference


def sde_log_prob_backward_reference(
    grad_log_prob_B: Tensor,
    grad_kl_B: Tensor | None,
    x: Tensor,
    v: Tensor,
    v_uncond: Tensor | None,
    scale: float,
    x_next: Tensor,
    c_x_B: Tensor,
    c_v_B: Tensor,
    std_B: Tensor,
    gaussian: bool,
    ref: Tensor | None,
    ref_uncond: Tensor | None,
    kl_weight_B: Tensor | None,
) -> Tensor:
    """The gradient with respect to v, the conditional branch."""
    difference_BD = rows(x_next).float() - step_mean_reference(x, v, v_uncond, scale, c_x_B, c_v_B)
    slope_B = 2.0 / difference_BD.shape[1] * scale * c_v_B
    weight_B = 1.0 / (2.0 * (std_B * std_B)) if gaussian else 1.0
    grad_BD = (slope_B * grad_log_prob_B * weight_B)[:, None] * difference_BD
    if ref is not None and kl_weight_B is not None and grad_kl_B is not None:
        kl_slope_B = slope_B * grad_kl_B * kl_weight_B * c_v_B
        grad_BD = grad_BD + kl_slope_B[:, None] * shift_reference(v, v_uncond, scale, ref, ref_uncond)
    return grad_BD.to(v.dtype).view(v.shape)


def shift_reference(v: Tensor, v_uncond: Tensor | None, scale: float, ref: Tensor, ref_uncond: Tensor | None) -> Tensor:
    """v - v_reference, float32 [B, D]."""
    return rows(guided_reference(v, v_uncond, scale)) - rows(guided_reference(ref, ref_uncond, scale))


@triton.jit
def load_step(
    x_ptr, v_ptr, v_uncond_ptr, x_next_ptr, ref_ptr, ref_uncond_ptr, c_x_ptr, c_v_ptr, scale, row, cols, mask, D,
    GUIDED: tl.constexpr, HAS_REFERENCE: tl.constexpr,
):  # fmt: skip
    """x_next - mean and v - v_reference."""
    x = load_row(x_ptr, row, cols, mask, D)
    v = load_velocity(v_ptr, v_uncond_ptr, scale, row, cols, mask, D, GUIDED)
    # rounded as `step_mean_kernel` rounds, with v at hand for the divergence
    difference = load_row(x_next_ptr, row, cols, mask, D) - (tl.load(c_x_ptr + row) * x + tl.load(c_v_ptr + row) * v)
    shift = v
    if HAS_REFERENCE:
        shift = v - load_velocity(ref_ptr, ref_uncond_ptr, scale, row, cols, mask, D, GUIDED)
    return difference, shift


@triton.jit
def _sde_log_prob_backward_kernel(
    grad_v_ptr, grad_log_prob_ptr, grad_kl_ptr, x_ptr, v_ptr, v_uncond_ptr, x_next_ptr, ref_ptr, ref_uncond_ptr,
    c_x_ptr, c_v_ptr, std_ptr, kl_weight_ptr, scale, two_over_d, D,
    GAUSSIAN: tl.constexpr, GUIDED: tl.constexpr, HAS_REFERENCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < D
    difference, shift = load_step(
        x_ptr, v_ptr, v_uncond_ptr, x_next_ptr, ref_ptr, ref_uncond_ptr, c_x_ptr, c_v_ptr, scale, row, cols, mask, D,
        GUIDED, HAS_REFERENCE,
    )  # fmt: skip
    c_v = tl.load(c_v_ptr + row)
    slope = two_over_d * scale * c_v
    weight = slope * tl.load(grad_log_prob_ptr + row)
    if GAUSSIAN:
        std = tl.load(std_ptr + row)
        weight = tl.div_rn(weight, 2.0 * (std * std))
    grad = weight * difference
    if HAS_REFERENCE:
        grad += slope * tl.load(grad_kl_ptr + row) * tl.load(kl_weight_ptr + row) * c_v * shift
    tl.store(grad_v_ptr + row * D + cols, grad.to(grad_v_ptr.dtype.element_ty), mask=mask)


def _sde_log_prob_backward_triton(
    grad_log_prob_B: Tensor,
    grad_kl_B: Tensor | None,
    x: Tensor,
    v: Tensor,
    v_uncond: Tensor | None,
    scale: float,
    x_next: Tensor,
    c_x_B: Tensor,
    c_v_B: Tensor,
    std_B: Tensor,
    gaussian: bool,
    ref: Tensor | None,
    ref_uncond: Tensor | None,
    kl_weight_B: Tensor | None,
) -> Tensor:
    x_BD, v_BD, std_B = rows(x), rows(v), std_B.contiguous()
    B, D = x_BD.shape
    grad_v_BD = torch.empty_like(v_BD)
    has_reference = ref is not None and kl_weight_B is not None and grad_kl_B is not None
    v_uncond_BD, ref_BD, ref_uncond_BD = (rows_or(v_BD, branch) for branch in (v_uncond, ref, ref_uncond))
    grad_kl_B, kl_weight_B = (std_B if tensor is None else tensor.contiguous() for tensor in (grad_kl_B, kl_weight_B))
    if B > 0:
        _sde_log_prob_backward_kernel[(B, triton.cdiv(D, BLOCK))](
            grad_v_BD, grad_log_prob_B.contiguous(), grad_kl_B, x_BD, v_BD, v_uncond_BD, rows(x_next), ref_BD,
            ref_uncond_BD, c_x_B.contiguous(), c_v_B.contiguous(), std_B, kl_weight_B, scale, 2.0 / D, D,
            GAUSSIAN=gaussian, GUIDED=v_uncond is not None, HAS_REFERENCE=has_reference, BLOCK=BLOCK, **NO_FUSION,
        )  # fmt: skip
    return grad_v_BD.view(v.shape)


sde_log_prob_backward = define_op(
    "sde_log_prob_backward", triton=_sde_log_prob_backward_triton, reference=sde_log_prob_backward_reference
)
