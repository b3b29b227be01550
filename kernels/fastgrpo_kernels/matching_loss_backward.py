"""The gradient of `matching_loss` with respect to the velocity, and what both passes compute of an element.

    old = v_old - u,  u = noise - x_0          shift = v - v_old          plus, minus = old +- beta * shift
    d / d v = 2 / D * (g_plus * beta * plus - g_minus * beta * minus + g_drift * shift + g_ref * (v - v_reference))

The target u is never stored: noise that is drawn is drawn again.  Letters: B samples, D latent elements of one sample,
E the errors of `MatchingErrors`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgrpo_kernels.guidance import load_row
from fastgrpo_kernels.noise import load_noise, noise_pointers, noise_reference
from fastgrpo_kernels.op import define_op
from fastgrpo_kernels.philox import NO_FUSION
from fastgrpo_kernels.step_mean import BLOCK, rows, rows_or


def matching_loss_backward_reference(
    grad_EB: Tensor,
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
    """The gradient with respect to v."""
    old_BD, shift_BD = errors_reference(v, v_old, x_0, noise, seed, stream, prompt_ids_B, sample_ids_B)
    grad_plus_B, grad_minus_B, _, _, _, grad_drift_B, grad_reference_B = grad_EB.unbind()
    two_over_d = 2.0 / old_BD.shape[1]
    step_BD = 0.0 if shift_BD is None else beta * shift_BD
    grad_BD = (two_over_d * beta * grad_plus_B)[:, None] * (old_BD + step_BD)
    grad_BD = grad_BD - (two_over_d * beta * grad_minus_B)[:, None] * (old_BD - step_BD)
    if shift_BD is not None:
        grad_BD = grad_BD + (two_over_d * grad_drift_B)[:, None] * shift_BD
    if v_reference is not None:
        grad_BD = grad_BD + (two_over_d * grad_reference_B)[:, None] * (rows(v).float() - rows(v_reference).float())
    return grad_BD.to(v.dtype).view(v.shape)


def errors_reference(
    v: Tensor,
    v_old: Tensor | None,
    x_0: Tensor,
    noise: Tensor | None,
    seed: int,
    stream: int,
    prompt_ids_B: Tensor | None,
    sample_ids_B: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """v_old - u and v - v_old, float32 [B, D]; without v_old, which is then v, the second is None."""
    x_0_BD, v_BD = rows(x_0).float(), rows(v).float()
    target_BD = noise_reference(noise, seed, stream, prompt_ids_B, sample_ids_B, x_0_BD.shape[1]) - x_0_BD
    if v_old is None:
        return v_BD - target_BD, None
    v_old_BD = rows(v_old).float()
    return v_old_BD - target_BD, v_BD - v_old_BD


@triton.jit
def load_errors(
    v_ptr, v_old_ptr, x_0_ptr, noise_ptr, prompt_ids_ptr, sample_ids_ptr, v_reference_ptr, seed, stream,
    row, block, cols, mask, D, HAS_OLD: tl.constexpr, DRAWN: tl.constexpr, HAS_REFERENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """v_old - u, v - v_old and v - v_reference, zero beyond the end of the sample; what there is not is not read."""
    noise = load_noise(noise_ptr, prompt_ids_ptr, sample_ids_ptr, seed, stream, row, block, cols, mask, D, DRAWN, BLOCK)
    target = noise - load_row(x_0_ptr, row, cols, mask, D)
    v = load_row(v_ptr, row, cols, mask, D)
    v_old = v
    if HAS_OLD:
        v_old = load_row(v_old_ptr, row, cols, mask, D)
    divergence = v
    if HAS_REFERENCE:
        divergence = v - load_row(v_reference_ptr, row, cols, mask, D)
    return tl.where(mask, v_old - target, 0.0), v - v_old, divergence


@triton.jit(do_not_specialize=["seed", "stream"])
def _matching_loss_backward_kernel(
    grad_v_ptr, grad_ptr, v_ptr, v_old_ptr, x_0_ptr, noise_ptr, prompt_ids_ptr, sample_ids_ptr, v_reference_ptr,
    seed, stream, beta, two_beta_over_d, two_over_d, B, D,
    HAS_OLD: tl.constexpr, DRAWN: tl.constexpr, HAS_REFERENCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    cols = block * BLOCK + tl.arange(0, BLOCK)
    mask = cols < D
    old, shift, divergence = load_errors(
        v_ptr, v_old_ptr, x_0_ptr, noise_ptr, prompt_ids_ptr, sample_ids_ptr, v_reference_ptr, seed, stream,
        row, block, cols, mask, D, HAS_OLD, DRAWN, HAS_REFERENCE, BLOCK,
    )  # fmt: skip
    plus, minus = old, old
    if HAS_OLD:
        plus, minus = old + beta * shift, old - beta * shift
    # rows of the gradient are in the order of `MatchingErrors`
    grad = (two_beta_over_d * tl.load(grad_ptr + row)) * plus
    grad -= (two_beta_over_d * tl.load(grad_ptr + B + row)) * minus
    if HAS_OLD:
        grad += (two_over_d * tl.load(grad_ptr + 5 * B + row)) * shift
    if HAS_REFERENCE:
        grad += (two_over_d * tl.load(grad_ptr + 6 * B + row)) * divergence
    tl.store(grad_v_ptr + row * D + cols, grad.to(grad_v_ptr.dtype.element_ty), mask=mask)


def _matching_loss_backward_triton(
    grad_EB: Tensor,
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
    B, D = v_BD.shape
    grad_v_BD = torch.empty_like(v_BD)
    if B > 0:
        _matching_loss_backward_kernel[(B, triton.cdiv(D, BLOCK))](
            grad_v_BD, grad_EB.contiguous(), v_BD, rows_or(v_BD, v_old), x_0_BD,
            *noise_pointers(x_0_BD, noise, prompt_ids_B, sample_ids_B), rows_or(v_BD, v_reference), seed, stream,
            beta, 2.0 / D * beta, 2.0 / D, B, D,
            HAS_OLD=v_old is not None, DRAWN=noise is None, HAS_REFERENCE=v_reference is not None, BLOCK=BLOCK,
            **NO_FUSION,
        )  # fmt: skip
    return grad_v_BD.view(v.shape)


matching_loss_backward = define_op(
    "matching_loss_backward", triton=_matching_loss_backward_triton, reference=matching_loss_backward_reference
)
