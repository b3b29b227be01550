"""Kernels for reinforcement learning of flow-matching models.  CUDA tensors run Triton, CPU tensors plain PyTorch."""

from fastgrpo_kernels.group_advantage import group_advantage
from fastgrpo_kernels.grpo_loss import GRPOStats, grpo_loss
from fastgrpo_kernels.philox import philox_normal, philox_uint32
from fastgrpo_kernels.preprocess_images import preprocess_images
from fastgrpo_kernels.sde_log_prob import sde_log_prob
from fastgrpo_kernels.sde_step import sde_step

__all__ = [
    "GRPOStats",
    "group_advantage",
    "grpo_loss",
    "philox_normal",
    "philox_uint32",
    "preprocess_images",
    "sde_log_prob",
    "sde_step",
]
