"""The refit of a noise search: mean and std of the elites, whose noise is drawn again and never read.

    c_t  = mean + std * noise of elite t
    mean' = (1 - momentum) * sum over T of w_t c_t                          + momentum * mean
    std'  = (1 - momentum) * sqrt(sum over T of w_t (c_t - sum w c)^2)      + momentum * std,  at least std_floor

The cross-entropy method of Smart-GRPO (arXiv:2510.02654).  Whatever T is, the traffic is mean and std in and out;
moments are accumulated by West's update (CACM 1979), one elite after the other.  Letters: P prompts, T elites, D latent
elements.
"""

import math
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgrpo_kernels.op import define_op
from fastgrpo_kernels.philox import (
    NO_FUSION,
    check_candidate_ids,
    check_seed,
    interleave_quads,
    normal_quads,
    philox_normal_reference,
)
from fastgrpo_kernels.sample_candidates import check_moments, load_moments

QUADS = 256


def refit_moments_reference(
    mean_PD: Tensor,
    std_PD: Tensor,
    seed: int,
    stream: int,
    prompt_ids_P: Tensor,
    elite_ids_PT: Tensor,
    weights_PT: Tensor,
    momentum: float,
    std_floor: float,
    project: bool,
) -> tuple[Tensor, Tensor]:
    """The operator on the CPU, and what the tests compare the kernel with."""
    mean_PD, std_PD = mean_PD.float(), std_PD.float().expand_as(mean_PD)
    noise_PTD = philox_normal_reference(seed, stream, prompt_ids_P, elite_ids_PT, mean_PD.shape[1], torch.float32)
    weights_PT1 = weights_PT[:, :, None]
    noise_mean_PD = (weights_PT1 * noise_PTD).sum(dim=1)
    noise_var_PD = (weights_PT1 * (noise_PTD - noise_mean_PD[:, None]).square()).sum(dim=1)
    refit_mean_PD = torch.lerp(mean_PD + std_PD * noise_mean_PD, mean_PD, momentum)
    refit_std_PD = torch.lerp(std_PD * noise_var_PD.sqrt(), std_PD, momentum).clamp_min(std_floor)
    if project:
        refit_mean_PD = _on_sphere(refit_mean_PD, refit_mean_PD.double().square().sum(dim=1))
    return refit_mean_PD, refit_std_PD


def _on_sphere(mean_PD: Tensor, square_sum_P: Tensor) -> Tensor:
    """Rescaled to norm sqrt(D), which plain noise has; a mean of zero stays."""
    scale_P = torch.where(square_sum_P > 0, (mean_PD.shape[1] / square_sum_P).sqrt(), 1.0)
    return mean_PD * scale_P[:, None].float()


@triton.jit
def _add_elite(noise, weight, share, mean, var):
    """West's update of a weighted mean and sum of squares by one elite that brings ``share`` of the weight so far."""
    distance = noise - mean
    return mean + share * distance, var + weight * (1.0 - share) * (distance * distance)


@triton.jit(do_not_specialize=["seed", "stream"])
def _refit_moments_kernel(
    refit_mean_ptr, refit_std_ptr, partial_ptr, mean_ptr, std_ptr, prompt_ids_ptr, elite_ids_ptr, weights_ptr,
    seed, stream, momentum, std_floor, D,
    STD_PER_PROMPT: tl.constexpr, T: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    block, p = tl.program_id(0), tl.program_id(1).to(tl.int64)
    cols = block * (4 * QUADS) + tl.arange(0, 4 * QUADS)
    mask = cols < D
    prompt_id = tl.load(prompt_ids_ptr + p)
    # elements are put in order only at the end: between threads, that is an exchange an elite
    mean0 = tl.zeros((QUADS,), dtype=tl.float32)
    mean1, mean2, mean3, var0, var1, var2, var3 = mean0, mean0, mean0, mean0, mean0, mean0, mean0
    weight_sum = 0.0
    for t in range(T):
        weight = tl.load(weights_ptr + p * T + t)
        weight_sum += weight
        elite_id = tl.load(elite_ids_ptr + p * T + t)
        # elites of no weight may come before any that has one
        share = weight / tl.where(weight_sum > 0.0, weight_sum, 1.0)
        n0, n1, n2, n3 = normal_quads(seed, stream, prompt_id, elite_id, block, QUADS)
        mean0, var0 = _add_elite(n0, weight, share, mean0, var0)
        mean1, var1 = _add_elite(n1, weight, share, mean1, var1)
        mean2, var2 = _add_elite(n2, weight, share, mean2, var2)
        mean3, var3 = _add_elite(n3, weight, share, mean3, var3)
    noise_mean, noise_var = interleave_quads(mean0, mean1, mean2, mean3), interleave_quads(var0, var1, var2, var3)
    mean, std = load_moments(mean_ptr, std_ptr, p, cols, mask, D, STD_PER_PROMPT)
    refit_mean = mean + (1.0 - momentum) * (std * noise_mean)
    spread = std * tl.sqrt_rn(noise_var)
    refit_std = tl.maximum(spread + momentum * (std - spread), std_floor)
    tl.store(refit_mean_ptr + p * D + cols, refit_mean, mask=mask)
    tl.store(refit_std_ptr + p * D + cols, refit_std, mask=mask)
    square = tl.where(mask, refit_mean, 0.0).to(tl.float64)
    tl.store(partial_ptr + p * tl.num_programs(0) + block, tl.sum(square * square, axis=0))


def _refit_moments_triton(
    mean_PD: Tensor,
    std_PD: Tensor,
    seed: int,
    stream: int,
    prompt_ids_P: Tensor,
    elite_ids_PT: Tensor,
    weights_PT: Tensor,
    momentum: float,
    std_floor: float,
    project: bool,
) -> tuple[Tensor, Tensor]:
    P, D = mean_PD.shape
    num_blocks = triton.cdiv(D, 4 * QUADS)
    refit_mean_PD, refit_std_PD = (torch.empty(P, D, dtype=torch.float32, device=mean_PD.device) for _ in range(2))
    partial = torch.empty(P, num_blocks, dtype=torch.float64, device=mean_PD.device)
    if P > 0:
        _refit_moments_kernel[(num_blocks, P)](
            refit_mean_PD, refit_std_PD, partial, mean_PD.contiguous(), std_PD.contiguous(),
            prompt_ids_P.contiguous(), elite_ids_PT.contiguous(), weights_PT.contiguous(),
            seed, stream, momentum, std_floor, D,
            STD_PER_PROMPT=std_PD.shape[1] == 1 != D, T=elite_ids_PT.shape[1], QUADS=QUADS, **NO_FUSION,
        )  # fmt: skip
    if project:
        refit_mean_PD = _on_sphere(refit_mean_PD, partial.sum(dim=1))
    return refit_mean_PD, refit_std_PD


def _refit_moments_fake(
    mean_PD: Tensor,
    std_PD: Tensor,
    seed: int,
    stream: int,
    prompt_ids_P: Tensor,
    elite_ids_PT: Tensor,
    weights_PT: Tensor,
    momentum: float,
    std_floor: float,
    project: bool,
) -> tuple[Tensor, Tensor]:
    moments_PD = mean_PD.new_empty(mean_PD.shape, dtype=torch.float32)
    return moments_PD, torch.empty_like(moments_PD)


_refit_moments = define_op(
    "refit_moments", triton=_refit_moments_triton, reference=refit_moments_reference, fake=_refit_moments_fake
)


def refit_moments(
    mean: Tensor,
    std: Tensor,
    seed: int,
    stream: int,
    prompt_ids_P: Tensor,
    elite_ids_PT: Tensor,
    weights_PT: Tensor,
    *,
    momentum: float = 0.0,
    std_floor: float = 0.0,
    project: bool = False,
) -> tuple[Tensor, Tensor]:
    """The refitted mean and std, float32 of the shape of ``mean``.

    Elites are named by the ids, seed and stream that drew them in `sample_candidates` with the same ``mean`` and
    ``std``, before those were rounded to another dtype.  ``weights_PT`` are float32, of sum 1 over T: `elite_weights`.
    ``momentum`` is the share of the old moments that is kept, ``project`` rescales the mean to norm sqrt(D).  Raises
    ValueError for shapes, dtypes or devices that differ, a momentum outside [0, 1) or a negative std_floor.
    """
    check_seed(seed, stream)
    mean_PD, std_PD = check_moments(mean, std, prompt_ids_P)
    if elite_ids_PT.dim() != 2 or elite_ids_PT.shape[1] == 0:
        raise ValueError(f"elite_ids_PT must be [P, T] with T at least 1, got {tuple(elite_ids_PT.shape)}")
    elite_ids_PT = check_candidate_ids(prompt_ids_P, elite_ids_PT)
    if weights_PT.shape != elite_ids_PT.shape or weights_PT.dtype != torch.float32 or weights_PT.device != mean.device:
        raise ValueError(
            f"weights_PT must be float32 of shape {tuple(elite_ids_PT.shape)} on {mean.device}, got {weights_PT.dtype} "
            f"of shape {tuple(weights_PT.shape)} on {weights_PT.device}; use elite_weights"
        )
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must lie in [0, 1), got {momentum}; 0 keeps nothing of the old moments")
    if std_floor < 0:
        raise ValueError(f"std_floor must not be negative, got {std_floor}; 0 is no floor")
    refit_mean_PD, refit_std_PD = _refit_moments(
        mean_PD, std_PD, seed, stream, prompt_ids_P, elite_ids_PT, weights_PT, momentum, std_floor, project
    )
    return refit_mean_PD.view(mean.shape), refit_std_PD.view(mean.shape)


def elite_weights(
    rewards_PT: Tensor, kind: Literal["uniform", "rank", "softmax"] = "uniform", temperature: float = 1.0
) -> Tensor:
    """Weights [P, T], float32, that sum to 1 over T, of elites whose rewards fall along T.

    ``uniform``: 1 / T, Smart-GRPO; ``rank``: proportional to T, T - 1, ... 1; ``softmax``: of the rewards, divided by
    ``temperature`` times their standard deviation within the prompt (MPPI, arXiv:1707.02342).
    """
    if kind not in ("uniform", "rank", "softmax"):
        raise ValueError(f"kind must be uniform, rank or softmax, got {kind!r}")
    if not temperature > 0 or math.isinf(temperature):
        raise ValueError(
            f"temperature must be positive and finite, got {temperature}; use kind='uniform' for no weight"
        )
    num_elites = rewards_PT.shape[1]
    if kind == "uniform":
        return torch.full_like(rewards_PT, 1.0 / num_elites, dtype=torch.float32)
    if kind == "rank":
        falling_T = torch.arange(num_elites, 0, -1, dtype=torch.float32, device=rewards_PT.device)
        return (falling_T / falling_T.sum()).expand_as(rewards_PT)
    std_P1 = rewards_PT.float().std(dim=1, keepdim=True, correction=0)
    # equal rewards get equal weights, whatever their rounding
    return torch.softmax(rewards_PT.float() / (temperature * std_P1).clamp_min(1e-12), dim=1)
