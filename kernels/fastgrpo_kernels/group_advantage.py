"""GRPO's advantage: how much better a sample is than its group, for groups of any sizes in any order.

    advantage = clip((reward - mean of its group) / (std + eps), -clamp, clamp)

std is the population's: of the group (arXiv:2402.03300), of all rewards (Flow-GRPO's published recipes,
arXiv:2505.05470), or absent with its eps (Dr. GRPO, arXiv:2503.20783).  Rewards count as float32 and sums are float64.
So the sum of n < 2^29 equal rewards, whatever its order, and its n-th are exact: a group of equal rewards has exactly
no advantage, where a rounded mean would be blown up by eps.  Letters: B samples, U distinct groups.
"""

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgrpo_kernels.op import define_op

# samples that one program handles, and samples that it compares them with at a time
BLOCK = 8
CHUNK = 128


def group_advantage_reference(rewards_B: Tensor, groups_B: Tensor, std: str, eps: float, clamp: float) -> Tensor:
    """The operator on the CPU, and what the tests compare the kernel with."""
    _, index_B = groups_B.unique(return_inverse=True)
    counts_U = index_B.bincount().double()
    rewards_B = rewards_B.double()

    def group_mean(values_B: Tensor) -> Tensor:
        return (torch.zeros_like(counts_U).index_add_(0, index_B, values_B) / counts_U)[index_B]

    mean_B = group_mean(rewards_B)
    # an infinite reward leaves its group without a mean; the others must not be clamped to a number
    deviation_B = rewards_B - torch.where(mean_B.isfinite(), mean_B, torch.nan)
    if std == "group":
        deviation_B = deviation_B / (group_mean(deviation_B.square()).sqrt() + eps)
    elif std == "global":
        deviation_B = deviation_B / ((rewards_B - rewards_B.mean()).square().mean().sqrt() + eps)
    return deviation_B.clamp(-clamp, clamp).float()


@triton.jit
def _load_chunk(rewards_ptr, groups_ptr, groups, chunk, B, CHUNK: tl.constexpr):
    """The rewards of a chunk, which of them exist, and which of those share a group with which of the block."""
    cols = chunk * CHUNK + tl.arange(0, CHUNK)
    mask = cols < B
    rewards = tl.load(rewards_ptr + cols, mask=mask, other=0.0).to(tl.float64)
    same = (tl.load(groups_ptr + cols, mask=mask, other=0)[None, :] == groups[:, None]) & mask[None, :]
    return rewards, mask, same


@triton.jit
def _group_advantage_kernel(
    rewards_ptr, groups_ptr, advantage_ptr, eps, clamp, B,
    STD: tl.constexpr, NUM_CHUNKS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Each program reads all samples, once for the means and once for the variance: no sort, no atomics, no sync."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row_mask = rows < B
    groups = tl.load(groups_ptr + rows, mask=row_mask, other=0)
    sums = tl.zeros([BLOCK, CHUNK], tl.float64)
    counts = tl.zeros([BLOCK, CHUNK], tl.int32)
    total = tl.zeros([CHUNK], tl.float64)
    for chunk in range(NUM_CHUNKS):
        rewards, mask, same = _load_chunk(rewards_ptr, groups_ptr, groups, chunk, B, CHUNK)
        sums += tl.where(same, rewards[None, :], 0.0)
        counts += same.to(tl.int32)
        total += rewards
    # a row past the end may share its group with no sample
    count = tl.maximum(tl.sum(counts, axis=1), 1).to(tl.float64)
    mean = tl.sum(sums, axis=1) / count
    mean = tl.where(tl.abs(mean) < float("inf"), mean, float("nan"))
    advantage = tl.load(rewards_ptr + rows, mask=row_mask, other=0.0).to(tl.float64) - mean
    if STD != "none":
        global_mean = tl.sum(total, axis=0) / B
        squares = tl.zeros([BLOCK, CHUNK], tl.float64)
        total_squares = tl.zeros([CHUNK], tl.float64)
        for chunk in range(NUM_CHUNKS):
            rewards, mask, same = _load_chunk(rewards_ptr, groups_ptr, groups, chunk, B, CHUNK)
            if STD == "group":
                deviation = tl.where(same, rewards[None, :] - mean[:, None], 0.0)
                squares += deviation * deviation
            else:
                deviation = tl.where(mask, rewards - global_mean, 0.0)
                total_squares += deviation * deviation
        if STD == "group":
            advantage /= tl.sqrt(tl.sum(squares, axis=1) / count) + eps
        else:
            advantage /= tl.sqrt(tl.sum(total_squares, axis=0) / B) + eps
    # NaN fails both comparisons and stays
    advantage = tl.where(advantage > clamp, clamp, advantage)
    advantage = tl.where(advantage < -clamp, -clamp, advantage)
    tl.store(advantage_ptr + rows, advantage.to(tl.float32), mask=row_mask)


def _group_advantage_triton(rewards_B: Tensor, groups_B: Tensor, std: str, eps: float, clamp: float) -> Tensor:
    B, rewards_B = rewards_B.shape[0], rewards_B.contiguous()
    advantage_B = torch.empty_like(rewards_B)
    # a power of two, so that few numbers of samples need a compilation of their own
    num_chunks = triton.next_power_of_2(max(triton.cdiv(B, CHUNK), 1))
    _group_advantage_kernel[(triton.cdiv(B, BLOCK),)](
        rewards_B, groups_B.contiguous(), advantage_B, eps, clamp, B,
        STD=std, NUM_CHUNKS=num_chunks, BLOCK=BLOCK, CHUNK=CHUNK, num_warps=8,
    )  # fmt: skip
    return advantage_B


def _group_advantage_fake(rewards_B: Tensor, groups_B: Tensor, std: str, eps: float, clamp: float) -> Tensor:
    return rewards_B.new_empty(rewards_B.shape)


_group_advantage = define_op(
    "group_advantage",
    triton=_group_advantage_triton,
    reference=group_advantage_reference,
    fake=_group_advantage_fake,
)


def group_advantage(
    rewards_B: Tensor,
    groups_B: Tensor,
    *,
    std: Literal["group", "global", "none"] = "global",
    eps: float = 1e-4,
    clamp: float = 5.0,
) -> Tensor:
    """Advantages [B] in float32, without gradient.  groups_B are int64 labels: any numbers in any order.

    A reward that is not finite makes its group's advantages NaN, and with std="global" everyone's.  On a GPU, time
    grows with B^2.  Raises ValueError for other shapes and dtypes, devices that differ,
    rewards that require a gradient, an unknown std, and an eps or clamp that is not positive.
    """
    if std not in ("group", "global", "none"):
        raise ValueError(f"std must be group, global or none, got {std!r}")
    if not 0 < eps < float("inf"):
        raise ValueError(f"eps must be positive and finite, got {eps}; 1e-4 is Flow-GRPO's")
    if not clamp > 0:
        raise ValueError(f"clamp must be positive, got {clamp}; use math.inf for no limit")
    if rewards_B.dim() != 1 or not rewards_B.is_floating_point():
        raise ValueError(
            f"rewards_B must be a floating-point vector, got {rewards_B.dtype} of shape {tuple(rewards_B.shape)}; "
            "flatten it, and cast it to float32"
        )
    if groups_B.shape != rewards_B.shape or groups_B.dtype != torch.int64 or groups_B.device != rewards_B.device:
        raise ValueError(
            f"groups_B must be int64 of shape {tuple(rewards_B.shape)} on {rewards_B.device}, got {groups_B.dtype} of "
            f"shape {tuple(groups_B.shape)} on {groups_B.device}; pass the label of each sample's group"
        )
    if rewards_B.requires_grad and torch.is_grad_enabled():
        raise ValueError("group_advantage has no gradient and rewards_B requires one; pass rewards_B.detach()")
    return _group_advantage(rewards_B.float(), groups_B, std, float(eps), float(clamp))
