"""One reverse step of a flow SDE, fused with the log-probability of its result.

    mean     = c_x * x + c_v * v
    x_next   = mean + std * noise, rounded to the dtype of x
    log_prob = constant - weight * mean over D of (x_next - mean)^2

Every dynamics of the field is a choice of (c_x, c_v, std).  Gaussian: weight = 1 / (2 std^2), constant = -log(std) -
log(2 pi) / 2.  CPS as published (arXiv:2509.05952): weight 1, constant 0.  x_next is a sample: gradients flow from
log_prob to v as if x_next were given.  Letters: B samples, D latent elements of one sample.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgrpo_kernels.op import define_op
from fastgrpo_kernels.sde_log_prob import sde_log_prob_backward
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


def sde_step_reference(
    x: Tensor,
    v: Tensor,
    noise: Tensor,
    c_x_B: Tensor,
    c_v_B: Tensor,
    std_B: Tensor,
    weight_B: Tensor,
    constant_B: Tensor,
) -> tuple[Tensor, Tensor]:
    """The operator on the CPU and under tracing, and what the tests compare the kernel with."""
    mean_BD = step_mean_reference(rows(x), rows(v), c_x_B, c_v_B)
    # log_prob must describe the stored value, so round to the storage type first
    x_next_BD = (mean_BD + std_B[:, None] * rows(noise).float()).to(x.dtype)
    log_prob_B = constant_B - weight_B * mean_square_reference(x_next_BD.float() - mean_BD)
    return x_next_BD.view(x.shape), log_prob_B


@triton.jit
def _sde_step_kernel(
    x_ptr, v_ptr, noise_ptr, c_x_ptr, c_v_ptr, std_ptr, x_next_ptr, partial_ptr, D, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < D
    mean = step_mean_kernel(x_ptr, v_ptr, c_x_ptr, c_v_ptr, row, cols, mask, D)
    noise = load_row(noise_ptr, row, cols, mask, D)
    x_next = (mean + tl.load(std_ptr + row) * noise).to(x_next_ptr.dtype.element_ty)
    tl.store(x_next_ptr + row * D + cols, x_next, mask=mask)
    store_square_sum(partial_ptr, row, x_next.to(tl.float32) - mean, mask)


def _sde_step_triton(
    x: Tensor,
    v: Tensor,
    noise: Tensor,
    c_x_B: Tensor,
    c_v_B: Tensor,
    std_B: Tensor,
    weight_B: Tensor,
    constant_B: Tensor,
) -> tuple[Tensor, Tensor]:
    B, D = x.shape[0], x.numel() // x.shape[0]
    x_rows, partial = rows(x), empty_partial_sums(x)
    x_next_BD = torch.empty_like(x_rows)
    _sde_step_kernel[(B, triton.cdiv(D, BLOCK))](
        x_rows, rows(v), rows(noise), c_x_B.contiguous(), c_v_B.contiguous(), std_B.contiguous(),
        x_next_BD, partial, D, BLOCK=BLOCK, enable_fp_fusion=False,
    )  # fmt: skip
    return x_next_BD.view(x.shape), constant_B - weight_B * mean_square_of_partial_sums(partial, D)


_sde_step = define_op("sde_step", triton=_sde_step_triton, reference=sde_step_reference)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, v, _, c_x_B, c_v_B, _, weight_B, _ = inputs
    ctx.save_for_backward(x, v, output[0], c_x_B, c_v_B, weight_B)


def _backward(ctx: Any, grad_x_next: Tensor, grad_log_prob_B: Tensor) -> tuple[Tensor | None, ...]:
    no_grad_kl_B = torch.zeros_like(grad_log_prob_B)
    grad_v = sde_log_prob_backward(grad_log_prob_B, no_grad_kl_B, *ctx.saved_tensors, None, None)
    return None, grad_v, *[None] * 6


_sde_step.register_autograd(_backward, setup_context=_setup_context)


def sde_step(
    x: Tensor,
    v: Tensor,
    noise: Tensor,
    c_x_B: Tensor,
    c_v_B: Tensor,
    std_B: Tensor,
    weight_B: Tensor,
    constant_B: Tensor,
) -> tuple[Tensor, Tensor]:
    """x_next (shape and dtype of x, contiguous, no gradient) and log_prob_B (float32, differentiable in v).

    x, v and noise are [B, ...] of any layout and floating dtype, the coefficients float32 [B] with std_B > 0.  Raises
    ValueError for shapes, dtypes or devices that differ, for a gradient wanted elsewhere than in v, and on the CPU for
    a std_B that is not positive (on a GPU the check would have to wait for it).
    """
    check_samples(x=x, v=v, noise=noise)
    check_coefficients(x, c_x_B=c_x_B, c_v_B=c_v_B, std_B=std_B, weight_B=weight_B, constant_B=constant_B)
    check_no_gradient("sde_step", x=x, noise=noise, c_x_B=c_x_B, c_v_B=c_v_B)
    check_no_gradient("sde_step", std_B=std_B, weight_B=weight_B, constant_B=constant_B)
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and not bool((std_B > 0).all()):
        raise ValueError(f"std_B must be positive, got {std_B.tolist()}; take a deterministic step as c_x x + c_v v")
    x_next, log_prob_B = _sde_step(x, v, noise, c_x_B, c_v_B, std_B, weight_B, constant_B)
    return x_next.detach(), log_prob_B
