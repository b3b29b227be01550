"""The errors of which the losses on the forward process are made, one number a sample, in one pass.

    u  = noise - x_0                                             the target of the velocity
    v+ = v_old + beta * (v - v_old),  v- = v_old - beta * (v - v_old)
    plus, minus, old        mean over D of (v+ - u)^2, (v- - u)^2, (v_old - u)^2
    abs_plus, abs_minus     mean over D of |v+ - u|, |v- - u|
    drift, reference        mean over D of (v - v_old)^2, (v - v_reference)^2

DiffusionNFT (arXiv:2509.16117) is r * plus + (1 - r) * minus, r the share of a sample that is good; AWM
(arXiv:2509.25050) is advantage * plus with beta = 1.  All are in units of velocity, so t does not enter: x_t - t * v is
the prediction of x_0, whose error is t^2 times the squared one and t times the absolute one.  Differentiable in v.
Letters: B samples, D latent elements of one sample, E errors.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgrpo_kernels.checks import check_no_gradient, check_samples
from fastgrpo_kernels.guidance import GuidedVelocity
from fastgrpo_kernels.matching_loss_backward import errors_reference, load_errors, matching_loss_backward
from fastgrpo_kernels.noise import noise_arguments, noise_pointers
from fastgrpo_kernels.op import define_op
from fastgrpo_kernels.philox import NO_FUSION, PhiloxNoise
from fastgrpo_kernels.step_mean import BLOCK, mean_of_partial_sums, mean_square_reference, rows, rows_or


class MatchingErrors(NamedTuple):
    """float32 [B] each; plus, minus, drift and reference are differentiable in v."""

    plus: Tensor
    minus: Tensor
    old: Tensor
    abs_plus: Tensor
    abs_minus: Tensor
    drift: Tensor
    reference: Tensor


def matching_loss_reference(
    v: Tensor,
    v_old: Tensor | None,
    x_0: Tensor,
    noise: Tensor | None,
    seed: int,
    stream: int,
    prompt_ids_B: Tensor | None,
    sample_ids_B: Tensor | None,
    beta: float,
    v_reference: Tensor | None,
) -> Tensor:
    """The operator on the CPU and under tracing, and what the tests compare the kernel with; noise, or ids for it."""
    old_BD, shift_BD = errors_reference(v, v_old, x_0, noise, seed, stream, prompt_ids_B, sample_ids_B)
    old_B, abs_B = mean_square_reference(old_BD), _mean_absolute_reference(old_BD)
    drift_B = reference_B = torch.zeros_like(old_B)
    plus_B, minus_B, abs_plus_B, abs_minus_B = old_B, old_B, abs_B, abs_B
    if shift_BD is not None:
        plus_BD, minus_BD = old_BD + beta * shift_BD, old_BD - beta * shift_BD
        plus_B, minus_B = mean_square_reference(plus_BD), mean_square_reference(minus_BD)
        abs_plus_B, abs_minus_B = _mean_absolute_reference(plus_BD), _mean_absolute_reference(minus_BD)
        drift_B = mean_square_reference(shift_BD)
    if v_reference is not None:
        reference_B = mean_square_reference(rows(v).float() - rows(v_reference).float())
    return torch.stack([plus_B, minus_B, old_B, abs_plus_B, abs_minus_B, drift_B, reference_B])


def _mean_absolute_reference(difference_BD: Tensor) -> Tensor:
    return difference_BD.double().abs().mean(dim=1).float()


@triton.jit
def _store_error_sums(square_ptr, abs_ptr, error):
    """Partial sums of one block; float64, so that no order of summation shows in the float32 mean."""
    error = error.to(tl.float64)
    tl.store(square_ptr, tl.sum(error * error, axis=0))
    tl.store(abs_ptr, tl.sum(tl.abs(error), axis=0))


@triton.jit
def _store_square_sum(square_ptr, error):
    error = error.to(tl.float64)
    tl.store(square_ptr, tl.sum(error * error, axis=0))


@triton.jit(do_not_specialize=["seed", "stream"])
def _matching_loss_kernel(
    partial_ptr, v_ptr, v_old_ptr, x_0_ptr, noise_ptr, prompt_ids_ptr, sample_ids_ptr, v_reference_ptr,
    seed, stream, beta, D,
    HAS_OLD: tl.constexpr, DRAWN: tl.constexpr, HAS_REFERENCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block, num_blocks = tl.program_id(1), tl.num_programs(1)
    cols = block * BLOCK + tl.arange(0, BLOCK)
    mask = cols < D
    old, shift, divergence = load_errors(
        v_ptr, v_old_ptr, x_0_ptr, noise_ptr, prompt_ids_ptr, sample_ids_ptr, v_reference_ptr, seed, stream,
        row, block, cols, mask, D, HAS_OLD, DRAWN, HAS_REFERENCE, BLOCK,
    )  # fmt: skip
    # for each sum of a sample a row of blocks, in the order in which `_finish_errors_kernel` reads them
    stride = tl.num_programs(0).to(tl.int64) * num_blocks
    partial_ptr += row * num_blocks + block
    if HAS_OLD:
        # with plus and minus first, six registers spilled on sm_90
        _store_square_sum(partial_ptr + 5 * stride, shift)
        _store_square_sum(partial_ptr + 4 * stride, old)
        _store_error_sums(partial_ptr, partial_ptr + stride, old + beta * shift)
        _store_error_sums(partial_ptr + 2 * stride, partial_ptr + 3 * stride, old - beta * shift)
    else:
        _store_error_sums(partial_ptr, partial_ptr + stride, old)
    if HAS_REFERENCE:
        _store_square_sum(partial_ptr + (6 if HAS_OLD else 2) * stride, divergence)


@triton.jit(do_not_specialize=["D"])
def _finish_errors_kernel(
    error_ptr, partial_ptr, num_blocks, D, HAS_OLD: tl.constexpr, HAS_REFERENCE: tl.constexpr, BLOCKS: tl.constexpr
):  # fmt: skip
    row, B = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    plus = mean_of_partial_sums(partial_ptr, row, num_blocks, D, BLOCKS)
    abs_plus = mean_of_partial_sums(partial_ptr, row + B, num_blocks, D, BLOCKS)
    minus, old, abs_minus, drift, reference = plus, plus, abs_plus, 0.0, 0.0
    if HAS_OLD:
        minus = mean_of_partial_sums(partial_ptr, row + 2 * B, num_blocks, D, BLOCKS)
        abs_minus = mean_of_partial_sums(partial_ptr, row + 3 * B, num_blocks, D, BLOCKS)
        old = mean_of_partial_sums(partial_ptr, row + 4 * B, num_blocks, D, BLOCKS)
        drift = mean_of_partial_sums(partial_ptr, row + 5 * B, num_blocks, D, BLOCKS)
    if HAS_REFERENCE:
        reference = mean_of_partial_sums(partial_ptr, row + (6 if HAS_OLD else 2) * B, num_blocks, D, BLOCKS)
    # the order of `MatchingErrors`
    tl.store(error_ptr + row, plus)
    tl.store(error_ptr + row + B, minus)
    tl.store(error_ptr + row + 2 * B, old)
    tl.store(error_ptr + row + 3 * B, abs_plus)
    tl.store(error_ptr + row + 4 * B, abs_minus)
    tl.store(error_ptr + row + 5 * B, drift)
    tl.store(error_ptr + row + 6 * B, reference)


def _matching_loss_triton(
    v: Tensor,
    v_old: Tensor | None,
    x_0: Tensor,
    noise: Tensor | None,
    seed: int,
    stream: int,
    prompt_ids_B: Tensor | None,
    sample_ids_B: Tensor | None,
    beta: float,
    v_reference: Tensor | None,
) -> Tensor:
    v_BD, x_0_BD = rows(v), rows(x_0)
    (B, D), device = v_BD.shape, v.device
    has_old, has_reference = v_old is not None, v_reference is not None
    error_EB = torch.empty(len(MatchingErrors._fields), B, dtype=torch.float32, device=device)
    if B == 0:
        return error_EB
    num_sums, num_blocks = (6 if has_old else 2) + has_reference, triton.cdiv(D, BLOCK)
    partial = torch.empty(num_sums, B, num_blocks, dtype=torch.float64, device=device)
    _matching_loss_kernel[(B, num_blocks)](
        partial, v_BD, rows_or(v_BD, v_old), x_0_BD, *noise_pointers(x_0_BD, noise, prompt_ids_B, sample_ids_B),
        rows_or(v_BD, v_reference), seed, stream, beta, D,
        HAS_OLD=has_old, DRAWN=noise is None, HAS_REFERENCE=has_reference, BLOCK=BLOCK, **NO_FUSION,
    )  # fmt: skip
    _finish_errors_kernel[(B,)](
        error_EB, partial, num_blocks, D, HAS_OLD=has_old, HAS_REFERENCE=has_reference,
        BLOCKS=triton.next_power_of_2(num_blocks), **NO_FUSION,
    )  # fmt: skip
    return error_EB


_matching_loss = define_op("matching_loss", triton=_matching_loss_triton, reference=matching_loss_reference)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    v, v_old, x_0, noise, ctx.seed, ctx.stream, prompt_ids_B, sample_ids_B, ctx.beta, v_reference = inputs
    ctx.save_for_backward(v, v_old, x_0, noise, prompt_ids_B, sample_ids_B, v_reference)


def _backward(ctx: Any, grad_EB: Tensor) -> tuple[Tensor | None, ...]:
    v, v_old, x_0, noise, *ids, v_reference = ctx.saved_tensors
    grad_v = matching_loss_backward(grad_EB, v, v_old, x_0, noise, ctx.seed, ctx.stream, *ids, ctx.beta, v_reference)
    return grad_v, *[None] * 9


_matching_loss.register_autograd(_backward, setup_context=_setup_context)


def matching_loss(
    v: Tensor,
    v_old: Tensor | None,
    x_0: Tensor,
    noise: Tensor | PhiloxNoise,
    *,
    beta: float = 1.0,
    v_reference: Tensor | None = None,
) -> MatchingErrors:
    """The errors of each sample, float32 [B]; reference is zero without v_reference.

    v, v_old, x_0, v_reference and a given noise are [B, ...] of any layout and floating dtypes, which may differ;
    `PhiloxNoise` is that of `philox_normal` bit for bit, drawn in registers in each pass.  A v_old of None is v itself,
    detached: the first optimizer step of an iteration.  Gradients flow to v alone, from plus, minus, drift and
    reference.  Raises ValueError for a gradient wanted elsewhere, for shapes or devices that differ, for a beta that is
    not positive and finite, and for velocities that are guided.
    """
    velocities = {"v": v, "v_old": v_old, "v_reference": v_reference}
    for name, velocity in velocities.items():
        if isinstance(velocity, GuidedVelocity):
            raise ValueError(f"{name} is guided and the loss trains the conditional branch alone; pass its conditional")
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be positive and finite, got {beta}; DiffusionNFT takes 0.1 to 1")
    given, *drawn = noise_arguments("v", v, noise)
    samples = {**velocities, "x_0": x_0, "noise": given}
    check_samples(**{name: sample for name, sample in samples.items() if sample is not None})
    check_no_gradient("matching_loss", v_old=v_old, x_0=x_0, noise=given, v_reference=v_reference)
    errors = MatchingErrors(*_matching_loss(v, v_old, x_0, given, *drawn, float(beta), v_reference).unbind())
    return errors._replace(
        old=errors.old.detach(), abs_plus=errors.abs_plus.detach(), abs_minus=errors.abs_minus.detach()
    )
