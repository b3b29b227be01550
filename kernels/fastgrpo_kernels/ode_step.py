"""One deterministic step: the mean of a reverse step, guidance included.

    x_next = c_x * x + c_v * v

Euler's step on the ODE is c_x = 1, c_v = t_next - t.  Rounded as the mean inside `sde_step` is, bit for bit, and
differentiable in v.  Letters: B samples, D latent elements of one sample.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgrpo_kernels.checks import check_no_gradient, check_samples, per_sample
from fastgrpo_kernels.guidance import GuidedVelocity, branches
from fastgrpo_kernels.op import define_op
from fastgrpo_kernels.philox import NO_FUSION
from fastgrpo_kernels.step_mean import BLOCK, rows, rows_or, step_mean_kernel, step_mean_reference


def ode_step_reference(
    x: Tensor, v: Tensor, v_uncond: Tensor | None, scale: float, c_x_B: Tensor, c_v_B: Tensor
) -> Tensor:
    """The operator on the CPU and under tracing, and what the tests compare the kernel with."""
    return step_mean_reference(x, v, v_uncond, scale, c_x_B, c_v_B).to(x.dtype).view(x.shape)


@triton.jit
def _ode_step_kernel(
    x_next_ptr, x_ptr, v_ptr, v_uncond_ptr, c_x_ptr, c_v_ptr, scale, D, GUIDED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < D
    mean = step_mean_kernel(x_ptr, v_ptr, v_uncond_ptr, scale, c_x_ptr, c_v_ptr, row, cols, mask, D, GUIDED)
    tl.store(x_next_ptr + row * D + cols, mean.to(x_next_ptr.dtype.element_ty), mask=mask)


def _ode_step_triton(
    x: Tensor, v: Tensor, v_uncond: Tensor | None, scale: float, c_x_B: Tensor, c_v_B: Tensor
) -> Tensor:
    x_BD, v_BD = rows(x), rows(v)
    B, D = x_BD.shape
    x_next_BD = torch.empty_like(x_BD)
    if B > 0:
        _ode_step_kernel[(B, triton.cdiv(D, BLOCK))](
            x_next_BD, x_BD, v_BD, rows_or(v_BD, v_uncond), c_x_B.contiguous(),
            c_v_B.contiguous(), scale, D, GUIDED=v_uncond is not None, BLOCK=BLOCK, **NO_FUSION,
        )  # fmt: skip
    return x_next_BD.view(x.shape)


_ode_step = define_op("ode_step", triton=_ode_step_triton, reference=ode_step_reference)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, v, _, scale, _, c_v_B = inputs
    ctx.save_for_backward(c_v_B)
    ctx.scale, ctx.dtype = scale, v.dtype


def _backward(ctx: Any, grad_x_next: Tensor) -> tuple[Tensor | None, ...]:
    (c_v_B,) = ctx.saved_tensors
    slope = (ctx.scale * c_v_B).view(-1, *[1] * (grad_x_next.dim() - 1))
    return None, (slope * grad_x_next.float()).to(ctx.dtype), None, None, None, None


_ode_step.register_autograd(_backward, setup_context=_setup_context)


def ode_step(x: Tensor, v: Tensor | GuidedVelocity, c_x: float | Tensor, c_v: float | Tensor) -> Tensor:
    """x_next = c_x x + c_v v, contiguous, in the shape and dtype of x; differentiable in v.

    x and v are [B, ...] of any layout and floating dtype; a coefficient is a number or float32 [B].  Raises ValueError
    for shapes, dtypes or devices that differ and for a gradient wanted elsewhere than in v.
    """
    v_cond, v_uncond, scale = branches("v", v)
    check_samples(x=x, v=v_cond, **({} if v_uncond is None else {"v.unconditional": v_uncond}))
    check_no_gradient("ode_step", x=x, c_x=c_x, c_v=c_v)
    return _ode_step(x, v_cond, v_uncond, scale, *per_sample(x, c_x=c_x, c_v=c_v))
