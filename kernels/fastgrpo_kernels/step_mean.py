"""What the step operators must compute alike, bit for bit: the mean of a step, the distance from it, its log_prob.

    v        = v_uncond + scale * (v_cond - v_uncond)          without guidance v = v_cond
    mean     = c_x * x + c_v * v
    gaussian:  log_prob = -mean over D of (x_next - mean)^2 / (2 std^2) - log(std) - log(2 pi) / 2
    cps:       log_prob = -mean over D of (x_next - mean)^2

CPS (arXiv:2509.05952), as published, drops the variance and the constants.  The on-policy ratio is 1 only if a state
gets one log_prob, whichever op computes it and whatever batch it is in.  So products and sums are rounded one by one
(kernels are launched with NO_FUSION) and squares are summed in float64, where no order of summation shows in the
float32 result.  Letters: B samples, D latent elements of one sample.
"""

import math
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgrpo_kernels.guidance import guided_reference, load_row, load_velocity

# elements of one sample that one program handles
BLOCK = 1024
_HALF_LOG_2PI = tl.constexpr(0.5 * math.log(2.0 * math.pi))

LogProb = Literal["gaussian", "cps"]


def is_gaussian(log_prob: LogProb) -> bool:
    """Whether the log_prob is a normal density's; ValueError for a kind that there is not."""
    if log_prob not in ("gaussian", "cps"):
        raise ValueError(f"log_prob must be 'gaussian' or 'cps', got {log_prob!r}")
    return log_prob == "gaussian"


def rows(x: Tensor) -> Tensor:
    """[B, ...] of any layout -> contiguous [B, D]."""
    return x.flatten(1).contiguous()


def rows_or(default_BD: Tensor, x: Tensor | None) -> Tensor:
    """The rows of x, or the default where there is none: a kernel wants a pointer also where it reads nothing."""
    return default_BD if x is None else rows(x)


def step_mean_reference(
    x: Tensor, v: Tensor, v_uncond: Tensor | None, scale: float, c_x_B: Tensor, c_v_B: Tensor
) -> Tensor:
    """float32 [B, D]."""
    v_BD = guided_reference(rows(v), None if v_uncond is None else rows(v_uncond), scale)
    return c_x_B[:, None] * rows(x).float() + c_v_B[:, None] * v_BD


def mean_square_reference(difference_BD: Tensor) -> Tensor:
    return difference_BD.double().square().mean(dim=1).float()


def log_prob_reference(mean_square_B: Tensor, std_B: Tensor, gaussian: bool) -> Tensor:
    if not gaussian:
        return -mean_square_B
    return 0.0 - mean_square_B / (2.0 * (std_B * std_B)) - torch.log(std_B) - _HALF_LOG_2PI.value


@triton.jit
def step_mean_kernel(
    x_ptr, v_ptr, v_uncond_ptr, scale, c_x_ptr, c_v_ptr, row, cols, mask, D, GUIDED: tl.constexpr
):  # fmt: skip
    x = load_row(x_ptr, row, cols, mask, D)
    v = load_velocity(v_ptr, v_uncond_ptr, scale, row, cols, mask, D, GUIDED)
    return tl.load(c_x_ptr + row) * x + tl.load(c_v_ptr + row) * v


@triton.jit
def store_square_sum(partial_ptr, row, difference, mask):
    """One partial sum per block: atomics would make the result differ from run to run."""
    difference = tl.where(mask, difference, 0.0).to(tl.float64)
    tl.store(partial_ptr + row * tl.num_programs(1) + tl.program_id(1), tl.sum(difference * difference, axis=0))


@triton.jit
def mean_of_partial_sums(partial_ptr, row, num_blocks, D, BLOCKS: tl.constexpr):
    blocks = tl.arange(0, BLOCKS)
    partial = tl.load(partial_ptr + row * num_blocks + blocks, mask=blocks < num_blocks, other=0.0)
    return (tl.sum(partial, axis=0) / D.to(tl.float64)).to(tl.float32)


@triton.jit(do_not_specialize=["D"])
def _finish_kernel(
    log_prob_ptr, kl_ptr, partial_ptr, kl_partial_ptr, std_ptr, kl_weight_ptr, num_blocks, D,
    GAUSSIAN: tl.constexpr, HAS_REFERENCE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    mean_square = mean_of_partial_sums(partial_ptr, row, num_blocks, D, BLOCKS)
    log_prob = 0.0 - mean_square
    if GAUSSIAN:
        std = tl.load(std_ptr + row)
        log_prob = 0.0 - tl.div_rn(mean_square, 2.0 * (std * std)) - tl.log(std) - _HALF_LOG_2PI
    tl.store(log_prob_ptr + row, log_prob)
    if HAS_REFERENCE:
        kl_mean_square = mean_of_partial_sums(kl_partial_ptr, row, num_blocks, D, BLOCKS)
        tl.store(kl_ptr + row, tl.load(kl_weight_ptr + row) * kl_mean_square)


def empty_partial_sums(x_BD: Tensor) -> Tensor:
    B, D = x_BD.shape
    return torch.empty(B, triton.cdiv(D, BLOCK), dtype=torch.float64, device=x_BD.device)


def finish_triton(
    partial: Tensor,
    kl_partial: Tensor | None,
    std_B: Tensor,
    kl_weight_B: Tensor | None,
    D: int,
    gaussian: bool,
) -> tuple[Tensor, Tensor]:
    """log_prob and KL of partial sums of squares, in one launch; KL is 0 without its sums."""
    B, num_blocks = partial.shape
    log_prob_B = torch.empty(B, dtype=torch.float32, device=partial.device)
    kl_B = torch.zeros_like(log_prob_B) if kl_partial is None else torch.empty_like(log_prob_B)
    _finish_kernel[(B,)](
        log_prob_B, kl_B, partial, partial if kl_partial is None else kl_partial, std_B.contiguous(),
        std_B if kl_weight_B is None else kl_weight_B.contiguous(), num_blocks, D, GAUSSIAN=gaussian,
        HAS_REFERENCE=kl_partial is not None, BLOCKS=triton.next_power_of_2(num_blocks), enable_fp_fusion=False,
    )  # fmt: skip
    return log_prob_B, kl_B
