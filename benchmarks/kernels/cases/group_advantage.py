"""The advantages of an iteration's samples: some kilobytes, so launches decide, and who waits for the GPU."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from benchmarks.kernels.case import Case, Inputs, Outputs, Run, Scale, Size, Variant, compiled
from fastgrpo_kernels import group_advantage

_GROUP_SIZE = 24
_EPS, _CLAMP = 1e-4, 5.0


def cases(scale: Scale) -> list[Case]:
    size = scale(Size(1152, ()))
    return [_case(size, "global"), _case(size, "group")]


def _eager(rewards_B: Tensor, group_size: int, std: str) -> Tensor:
    """For groups of one size whose samples are neighbours, as trainers that know this write it."""
    rewards_PG = rewards_B.view(-1, group_size)
    deviation_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    scale = rewards_B.std(correction=0) if std == "global" else rewards_PG.std(dim=1, keepdim=True, correction=0)
    return (deviation_PG / (scale + _EPS)).clamp(-_CLAMP, _CLAMP).flatten()


def _eager_labels(rewards_B: Tensor, groups_B: Tensor, std: str) -> Tensor:
    """For groups given by labels, which is what the operator takes; ``unique`` waits for the GPU."""
    _, index_B, counts_U = groups_B.unique(return_inverse=True, return_counts=True)

    def group_mean(values_B: Tensor) -> Tensor:
        return (torch.zeros_like(counts_U, dtype=values_B.dtype).index_add_(0, index_B, values_B) / counts_U)[index_B]

    deviation_B = rewards_B - group_mean(rewards_B)
    scale = rewards_B.std(correction=0) if std == "global" else group_mean(deviation_B.square()).sqrt()
    return (deviation_B / (scale + _EPS)).clamp(-_CLAMP, _CLAMP)


def _case(size: Size, std: Literal["global", "group"]) -> Case:
    group_size = min(_GROUP_SIZE, size.samples)
    B = size.samples // group_size * group_size

    def make(device: torch.device, seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        rewards_B = torch.rand(B, generator=generator, device=device)
        return {"rewards": rewards_B, "groups": torch.arange(B, device=device) // group_size}

    def triton(inputs: Inputs) -> Outputs:
        return (group_advantage(inputs["rewards"], inputs["groups"], std=std, eps=_EPS, clamp=_CLAMP),)

    def plain(function: Callable[..., Tensor]) -> Run:
        return lambda inputs: (function(inputs["rewards"], group_size, std),)

    def labels(inputs: Inputs) -> Outputs:
        return (_eager_labels(inputs["rewards"], inputs["groups"], std),)

    return Case(
        op="group_advantage",
        label=f"[{B}] float32, std {std}",
        make=make,
        variants={
            "triton": Variant(triton),
            "eager": Variant(plain(_eager)),
            "compile": Variant(plain(compiled(_eager))),
            "eager_labels": Variant(labels, waits=True),
        },
        expected=plain(_eager),
        num_elements=B,
        # rewards and labels; advantages
        read_bytes=B * 12,
        written_bytes=B * 4,
        limit="launch",
        streams=False,
    )
