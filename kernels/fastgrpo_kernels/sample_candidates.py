"""Candidates of a noise search: draws from N(mean, std^2), one distribution a prompt, in one pass.

    candidate (p, k) = mean_p + std_p * philox_normal(seed, stream, prompt id, candidate id)

The noise is that of ``philox.py``, so a candidate can be drawn again by its ids: nothing needs to store it.  With a
latent for the mean and one std a prompt this is a perturbation x + scale * noise.  Letters: P prompts, K candidates,
D latent elements.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgrpo_kernels.op import define_op
from fastgrpo_kernels.philox import (
    NO_FUSION,
    check_candidate_ids,
    check_numel,
    check_seed,
    normal_block,
    philox_normal_reference,
    rows_of_ids,
)

# with four elements a thread, noise is stored where it was drawn: no exchange between threads
QUADS = 128
# mean and std are read once for so many candidates
CANDIDATES_PER_PROGRAM = 8


def sample_candidates_reference(
    mean_PD: Tensor,
    std_PD: Tensor,
    seed: int,
    stream: int,
    prompt_ids_P: Tensor,
    candidate_ids_PK: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """The operator on the CPU, and what the tests compare the kernel with; std_PD may be [P, 1]."""
    numel = mean_PD.shape[1]
    candidates_PKD = philox_normal_reference(seed, stream, prompt_ids_P, candidate_ids_PK, numel, torch.float32)
    candidates_PKD.mul_(std_PD[:, None].float()).add_(mean_PD[:, None].float())
    # the operator may not hand on its input, and .to() copies only to change the dtype
    return candidates_PKD.to(dtype)


@triton.jit
def load_moments(mean_ptr, std_ptr, row, cols, mask, D, STD_PER_PROMPT: tl.constexpr):
    mean = tl.load(mean_ptr + row * D + cols, mask=mask, other=0.0).to(tl.float32)
    if STD_PER_PROMPT:
        return mean, tl.load(std_ptr + row).to(tl.float32) + mean * 0.0
    return mean, tl.load(std_ptr + row * D + cols, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["seed", "stream"])
def _sample_candidates_kernel(
    out_ptr, mean_ptr, std_ptr, prompt_ids_ptr, candidate_ids_ptr, seed, stream, prompt_stride, K, D,
    STD_PER_PROMPT: tl.constexpr, CANDIDATES: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    block, p = tl.program_id(0), tl.program_id(2).to(tl.int64)
    cols = block * (4 * QUADS) + tl.arange(0, 4 * QUADS)
    mask = cols < D
    mean, std = load_moments(mean_ptr, std_ptr, p, cols, mask, D, STD_PER_PROMPT)
    prompt_id = tl.load(prompt_ids_ptr + p)
    for j in range(CANDIDATES):
        k = tl.program_id(1) * CANDIDATES + j
        candidate_id = tl.load(candidate_ids_ptr + p * prompt_stride + k, mask=k < K, other=0)
        candidate = normal_block(seed, stream, prompt_id, candidate_id, block, QUADS) * std + mean
        rounded = candidate.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (p * K + k) * D + cols, rounded, mask=mask & (k < K))


def _sample_candidates_triton(
    mean_PD: Tensor,
    std_PD: Tensor,
    seed: int,
    stream: int,
    prompt_ids_P: Tensor,
    candidate_ids_PK: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    (P, K), D = candidate_ids_PK.shape, mean_PD.shape[1]
    out_PKD = torch.empty(P, K, D, dtype=dtype, device=mean_PD.device)
    candidate_ids_PK, prompt_stride = rows_of_ids(candidate_ids_PK)
    if out_PKD.numel() > 0:
        grid = (triton.cdiv(D, 4 * QUADS), triton.cdiv(K, CANDIDATES_PER_PROGRAM), P)
        _sample_candidates_kernel[grid](
            out_PKD, mean_PD.contiguous(), std_PD.contiguous(), prompt_ids_P.contiguous(), candidate_ids_PK,
            seed, stream, prompt_stride, K, D, STD_PER_PROMPT=std_PD.shape[1] == 1 != D,
            CANDIDATES=min(CANDIDATES_PER_PROGRAM, triton.next_power_of_2(K)), QUADS=QUADS, **NO_FUSION,
        )  # fmt: skip
    return out_PKD


def _sample_candidates_fake(
    mean_PD: Tensor,
    std_PD: Tensor,
    seed: int,
    stream: int,
    prompt_ids_P: Tensor,
    candidate_ids_PK: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    return mean_PD.new_empty(*candidate_ids_PK.shape, mean_PD.shape[1], dtype=dtype)


_sample_candidates = define_op(
    "sample_candidates",
    triton=_sample_candidates_triton,
    reference=sample_candidates_reference,
    fake=_sample_candidates_fake,
)


def sample_candidates(
    mean: Tensor,
    std: Tensor,
    seed: int,
    stream: int,
    prompt_ids_P: Tensor,
    candidate_ids: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Candidates [P, K, ...] in ``dtype``: candidate k of prompt p is a function of its moments, ids, seed and stream.

    mean is [P, ...] of any floating dtype, std of its shape or [P]; ids are as in `philox_normal`, ``candidate_ids``
    [K] or [P, K].  Computed in float32 and rounded once.  No gradient.  Raises ValueError for shapes, dtypes or devices
    that differ and, on the CPU, for a negative std.
    """
    check_seed(seed, stream)
    candidate_ids_PK = check_candidate_ids(prompt_ids_P, candidate_ids)
    mean_PD, std_PD = check_moments(mean, std, prompt_ids_P)
    candidates_PKD = _sample_candidates(mean_PD, std_PD, seed, stream, prompt_ids_P, candidate_ids_PK, dtype)
    return candidates_PKD.view(*candidate_ids_PK.shape, *mean.shape[1:])


def check_moments(mean: Tensor, std: Tensor, prompt_ids_P: Tensor) -> tuple[Tensor, Tensor]:
    """Moments as [P, D], std as [P, 1] where it is one number a prompt; ValueError if they do not fit each other."""
    for name, moment in (("mean", mean), ("std", std)):
        if not moment.is_floating_point() or moment.device != prompt_ids_P.device:
            raise ValueError(
                f"{name} must be floating point on {prompt_ids_P.device}, got {moment.dtype} on {moment.device}; "
                "cast it, and move it to the device of the ids"
            )
        if moment.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"noise is drawn without gradient and {name} requires one; pass {name}.detach()")
    if mean.dim() < 2 or len(mean) != len(prompt_ids_P) or std.shape not in (mean.shape, mean.shape[:1]):
        raise ValueError(
            f"mean must be [P, ...] with P = {len(prompt_ids_P)} and std of its shape or [P], got {tuple(mean.shape)} "
            f"and {tuple(std.shape)}; give every prompt id its own mean"
        )
    check_numel(mean[0:1].numel() if len(mean) else 1)
    if std.device.type == "cpu" and not torch.compiler.is_compiling() and bool((std < 0).any()):
        raise ValueError(f"std must not be negative, got {std.min().item()}; 0 draws the mean itself")
    return mean.flatten(1), std.flatten(1) if std.shape == mean.shape else std[:, None]
