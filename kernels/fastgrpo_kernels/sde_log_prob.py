"""The log-probability of a stored reverse step, and its KL divergence to the reference policy, in one pass.

    mean     = c_x * x + c_v * v
    log_prob = of x_next under N(mean, std^2), mean over D: see ``step_mean.py``
    kl       = kl_weight * mean over D of (c_v * (v - v_reference))^2

Flow-GRPO's KL has kl_weight = 1 / (2 s^2), where s is std without the length of the step (arXiv:2505.05470).
Differentiable in v.  Letters: B samples, D latent elements of one sample.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgrpo_kernels.checks import check_no_gradient, check_positive, check_samples, per_sample
from fastgrpo_kernels.guidance import GuidedVelocity, branches
from fastgrpo_kernels.op import define_op
from fastgrpo_kernels.philox import NO_FUSION
from fastgrpo_kernels.sde_log_prob_backward import load_step, sde_log_prob_backward, shift_reference
from fastgrpo_kernels.step_mean import (
    BLOCK,
    LogProb,
    empty_partial_sums,
    finish_triton,
    is_gaussian,
    log_prob_reference,
    mean_square_reference,
    rows,
    rows_or,
    step_mean_reference,
    store_square_sum,
)


def sde_log_prob_reference(
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
) -> tuple[Tensor, Tensor]:
    """The operator on the CPU and under tracing, and what the tests compare the kernel with."""
    mean_BD = step_mean_reference(x, v, v_uncond, scale, c_x_B, c_v_B)
    log_prob_B = log_prob_reference(mean_square_reference(rows(x_next).float() - mean_BD), std_B, gaussian)
    if ref is None or kl_weight_B is None:
        return log_prob_B, torch.zeros_like(log_prob_B)
    shift_BD = c_v_B[:, None] * shift_reference(v, v_uncond, scale, ref, ref_uncond)
    return log_prob_B, kl_weight_B * mean_square_reference(shift_BD)


@triton.jit
def _sde_log_prob_kernel(
    partial_ptr, kl_partial_ptr, x_ptr, v_ptr, v_uncond_ptr, x_next_ptr, ref_ptr, ref_uncond_ptr, c_x_ptr, c_v_ptr,
    scale, D, GUIDED: tl.constexpr, HAS_REFERENCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < D
    difference, shift = load_step(
        x_ptr, v_ptr, v_uncond_ptr, x_next_ptr, ref_ptr, ref_uncond_ptr, c_x_ptr, c_v_ptr, scale, row, cols, mask, D,
        GUIDED, HAS_REFERENCE,
    )  # fmt: skip
    if HAS_REFERENCE:
        store_square_sum(kl_partial_ptr, row, tl.load(c_v_ptr + row) * shift, mask)
    store_square_sum(partial_ptr, row, difference, mask)


def _sde_log_prob_triton(
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
) -> tuple[Tensor, Tensor]:
    x_BD, v_BD = rows(x), rows(v)
    B, D = x_BD.shape
    if B == 0:
        return torch.empty_like(c_x_B), torch.empty_like(c_x_B)
    partial = empty_partial_sums(x_BD)
    kl_partial = None if ref is None else empty_partial_sums(x_BD)
    v_uncond_BD, ref_BD, ref_uncond_BD = (rows_or(v_BD, branch) for branch in (v_uncond, ref, ref_uncond))
    _sde_log_prob_kernel[(B, triton.cdiv(D, BLOCK))](
        partial, partial if kl_partial is None else kl_partial, x_BD, v_BD, v_uncond_BD, rows(x_next), ref_BD,
        ref_uncond_BD, c_x_B.contiguous(), c_v_B.contiguous(), scale, D,
        GUIDED=v_uncond is not None, HAS_REFERENCE=ref is not None, BLOCK=BLOCK, **NO_FUSION,
    )  # fmt: skip
    return finish_triton(partial, kl_partial, std_B, kl_weight_B, D, gaussian)


_sde_log_prob = define_op("sde_log_prob", triton=_sde_log_prob_triton, reference=sde_log_prob_reference)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, v, v_uncond, ctx.scale, x_next, c_x_B, c_v_B, std_B, ctx.gaussian, *reference = inputs
    ctx.save_for_backward(x, v, v_uncond, x_next, c_x_B, c_v_B, std_B, *reference)


def _backward(ctx: Any, grad_log_prob_B: Tensor, grad_kl_B: Tensor) -> tuple[Tensor | None, ...]:
    x, v, v_uncond, *step, ref, ref_uncond, kl_weight_B = ctx.saved_tensors
    grad_v = sde_log_prob_backward(
        grad_log_prob_B, grad_kl_B, x, v, v_uncond, ctx.scale, *step, ctx.gaussian, ref, ref_uncond, kl_weight_B
    )
    return None, grad_v, *[None] * 10


_sde_log_prob.register_autograd(_backward, setup_context=_setup_context)


def sde_log_prob(
    x: Tensor,
    v: Tensor | GuidedVelocity,
    x_next: Tensor,
    c_x: float | Tensor,
    c_v: float | Tensor,
    std: float | Tensor,
    *,
    log_prob: LogProb = "gaussian",
    v_reference: Tensor | GuidedVelocity | None = None,
    kl_weight: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """log_prob_B of x_next and kl_B to the reference policy, float32; kl_B is zero without v_reference.

    x, v, x_next and v_reference are [B, ...] of any layout and floating dtype, a coefficient is a number or float32
    [B], std positive.  On the result of `sde_step`, log_prob_B is that op's bit for bit.  Gradients flow to v alone.
    Raises ValueError for a gradient wanted elsewhere, for shapes, dtypes or devices that differ, for v and v_reference
    that are not guided alike, and for v_reference without kl_weight or vice versa.
    """
    v_cond, v_uncond, scale = branches("v", v)
    samples = {"x": x, "v": v_cond, "x_next": x_next}
    ref, ref_uncond, kl_weight_B = None, None, None
    if (v_reference is None) != (kl_weight is None):
        missing = "v_reference" if v_reference is None else "kl_weight"
        raise ValueError(f"{missing} is missing; pass v_reference and kl_weight together, or neither")
    if v_reference is not None and kl_weight is not None:
        ref, ref_uncond, ref_scale = branches("v_reference", v_reference)
        if (v_uncond is None) != (ref_uncond is None) or scale != ref_scale:
            raise ValueError(f"v has guidance {scale:g} and v_reference {ref_scale:g}; guide both alike")
        samples["v_reference"] = ref
        (kl_weight_B,) = per_sample(x, kl_weight=kl_weight)
    unconditional = {"v.unconditional": v_uncond, "v_reference.unconditional": ref_uncond}
    check_samples(**samples, **{name: value for name, value in unconditional.items() if value is not None})
    check_no_gradient("sde_log_prob", x=x, x_next=x_next, v_reference=ref)
    check_no_gradient("sde_log_prob", c_x=c_x, c_v=c_v, std=std, kl_weight=kl_weight)
    check_positive("std", std, "a deterministic step has no log_prob")
    coefficients_B = per_sample(x, c_x=c_x, c_v=c_v, std=std)
    return _sde_log_prob(
        x, v_cond, v_uncond, scale, x_next, *coefficients_B, is_gaussian(log_prob), ref, ref_uncond, kl_weight_B
    )
