"""One reverse step of a flow SDE, fused with guidance, its noise, and the log-probability of its result.

    mean     = c_x * x + c_v * v
    x_next   = mean + std * noise, rounded to the dtype of x
    log_prob = of the stored x_next under N(mean, std^2), mean over D: see ``step_mean.py``

Every dynamics of the field is a choice of (c_x, c_v, std).  x_next is a sample: gradients flow from log_prob to v as if
x_next were given.  Letters: B samples, D latent elements of one sample.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgrpo_kernels.checks import check_no_gradient, check_positive, check_samples, per_sample
from fastgrpo_kernels.guidance import GuidedVelocity, branches
from fastgrpo_kernels.noise import load_noise, noise_arguments, noise_pointers, noise_reference
from fastgrpo_kernels.op import define_op
from fastgrpo_kernels.philox import NO_FUSION, PhiloxNoise
from fastgrpo_kernels.sde_log_prob import sde_log_prob_backward
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
    step_mean_kernel,
    step_mean_reference,
    store_square_sum,
)


class SdeStep(NamedTuple):
    """x_next [B, ...] and log_prob [B]; ``mean`` [B, ...] in float32 where it was asked for."""

    x_next: Tensor
    log_prob_B: Tensor
    mean: Tensor | None


def sde_step_reference(
    x: Tensor,
    v: Tensor,
    v_uncond: Tensor | None,
    scale: float,
    noise: Tensor | None,
    seed: int,
    stream: int,
    prompt_ids_B: Tensor | None,
    sample_ids_B: Tensor | None,
    c_x_B: Tensor,
    c_v_B: Tensor,
    std_B: Tensor,
    gaussian: bool,
    return_mean: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator on the CPU and under tracing, and what the tests compare the kernel with; noise, or ids for it."""
    mean_BD = step_mean_reference(x, v, v_uncond, scale, c_x_B, c_v_B)
    noise_BD = noise_reference(noise, seed, stream, prompt_ids_B, sample_ids_B, mean_BD.shape[1])
    # log_prob must describe the stored value, so round to the storage type first
    x_next_BD = (mean_BD + std_B[:, None] * noise_BD).to(x.dtype)
    log_prob_B = log_prob_reference(mean_square_reference(x_next_BD.float() - mean_BD), std_B, gaussian)
    return x_next_BD.view(x.shape), log_prob_B, mean_BD.view(x.shape) if return_mean else mean_BD.new_empty(0)


@triton.jit(do_not_specialize=["seed", "stream"])
def _sde_step_kernel(
    x_next_ptr, mean_ptr, partial_ptr, x_ptr, v_ptr, v_uncond_ptr, noise_ptr, prompt_ids_ptr, sample_ids_ptr,
    c_x_ptr, c_v_ptr, std_ptr, scale, seed, stream, D,
    GUIDED: tl.constexpr, DRAWN: tl.constexpr, RETURN_MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    cols = block * BLOCK + tl.arange(0, BLOCK)
    mask = cols < D
    mean = step_mean_kernel(x_ptr, v_ptr, v_uncond_ptr, scale, c_x_ptr, c_v_ptr, row, cols, mask, D, GUIDED)
    noise = load_noise(noise_ptr, prompt_ids_ptr, sample_ids_ptr, seed, stream, row, block, cols, mask, D, DRAWN, BLOCK)
    x_next = (mean + tl.load(std_ptr + row) * noise).to(x_next_ptr.dtype.element_ty)
    tl.store(x_next_ptr + row * D + cols, x_next, mask=mask)
    if RETURN_MEAN:
        tl.store(mean_ptr + row * D + cols, mean, mask=mask)
    store_square_sum(partial_ptr, row, x_next.to(tl.float32) - mean, mask)


def _sde_step_triton(
    x: Tensor,
    v: Tensor,
    v_uncond: Tensor | None,
    scale: float,
    noise: Tensor | None,
    seed: int,
    stream: int,
    prompt_ids_B: Tensor | None,
    sample_ids_B: Tensor | None,
    c_x_B: Tensor,
    c_v_B: Tensor,
    std_B: Tensor,
    gaussian: bool,
    return_mean: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x_BD, v_BD = rows(x), rows(v)
    B, D = x_BD.shape
    x_next_BD, partial = torch.empty_like(x_BD), empty_partial_sums(x_BD)
    mean = torch.empty(x.shape if return_mean else (0,), dtype=torch.float32, device=x.device)
    if B == 0:
        return x_next_BD.view(x.shape), torch.empty_like(c_x_B), mean
    _sde_step_kernel[(B, triton.cdiv(D, BLOCK))](
        x_next_BD, mean if return_mean else partial, partial, x_BD, v_BD, rows_or(v_BD, v_uncond),
        *noise_pointers(x_BD, noise, prompt_ids_B, sample_ids_B), c_x_B.contiguous(), c_v_B.contiguous(),
        std_B.contiguous(), scale, seed, stream, D, GUIDED=v_uncond is not None, DRAWN=noise is None,
        RETURN_MEAN=return_mean, BLOCK=BLOCK, **NO_FUSION,
    )  # fmt: skip
    log_prob_B, _ = finish_triton(partial, None, std_B, None, D, gaussian)
    return x_next_BD.view(x.shape), log_prob_B, mean


_sde_step = define_op("sde_step", triton=_sde_step_triton, reference=sde_step_reference)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, v, v_uncond, ctx.scale, *_, c_x_B, c_v_B, std_B, ctx.gaussian, _ = inputs
    ctx.save_for_backward(x, v, v_uncond, output[0], c_x_B, c_v_B, std_B)


def _backward(ctx: Any, grad_x_next: Tensor, grad_log_prob_B: Tensor, grad_mean: Tensor) -> tuple[Tensor | None, ...]:
    x, v, v_uncond, x_next, c_x_B, c_v_B, std_B = ctx.saved_tensors
    grad_v = sde_log_prob_backward(
        grad_log_prob_B, None, x, v, v_uncond, ctx.scale, x_next, c_x_B, c_v_B, std_B, ctx.gaussian, None, None, None
    )
    return None, grad_v, *[None] * 12


_sde_step.register_autograd(_backward, setup_context=_setup_context)


def sde_step(
    x: Tensor,
    v: Tensor | GuidedVelocity,
    noise: Tensor | PhiloxNoise,
    c_x: float | Tensor,
    c_v: float | Tensor,
    std: float | Tensor,
    *,
    log_prob: LogProb = "gaussian",
    return_mean: bool = False,
) -> SdeStep:
    """x_next (shape and dtype of x, contiguous), its log_prob_B (float32, differentiable in v), and its mean if wanted.

    x, v and a given noise are [B, ...] of any layout and floating dtype; `PhiloxNoise` is drawn in registers and is
    that of `philox_normal` bit for bit.  A coefficient is a number or float32 [B], std positive.  Raises ValueError for
    shapes, dtypes or devices that differ, for a gradient wanted elsewhere than in v, and for a std that is not positive
    (but for a tensor on a GPU, which would have to be waited for).
    """
    v_cond, v_uncond, scale = branches("v", v)
    given, seed, stream, *ids = noise_arguments("x", x, noise)
    check_samples(
        x=x,
        v=v_cond,
        **({} if v_uncond is None else {"v.unconditional": v_uncond}),
        **({} if given is None else {"noise": given}),
    )
    check_no_gradient("sde_step", x=x, noise=given, c_x=c_x, c_v=c_v, std=std)
    check_positive("std", std, "take a deterministic step with ode_step")
    c_x_B, c_v_B, std_B = per_sample(x, c_x=c_x, c_v=c_v, std=std)
    x_next, log_prob_B, mean = _sde_step(
        x, v_cond, v_uncond, scale, given, seed, stream, *ids, c_x_B, c_v_B, std_B, is_gaussian(log_prob), return_mean
    )
    return SdeStep(x_next.detach(), log_prob_B, mean.detach() if return_mean else None)
