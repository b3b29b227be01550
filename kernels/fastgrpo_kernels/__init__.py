"""Kernels for reinforcement learning of flow-matching models.  CUDA tensors run Triton, CPU tensors plain PyTorch."""

from fastgrpo_kernels.add_noise import add_noise
from fastgrpo_kernels.group_advantage import group_advantage
from fastgrpo_kernels.grpo_loss import GRPOStats, grpo_loss
from fastgrpo_kernels.guidance import GuidedVelocity, combined
from fastgrpo_kernels.matching_loss import MatchingErrors, matching_loss
from fastgrpo_kernels.ode_step import ode_step
from fastgrpo_kernels.philox import PhiloxNoise, philox_normal, philox_uint32
from fastgrpo_kernels.preprocess_images import preprocess_images
from fastgrpo_kernels.refit_moments import elite_weights, refit_moments
from fastgrpo_kernels.sample_candidates import sample_candidates
from fastgrpo_kernels.sde_log_prob import sde_log_prob
from fastgrpo_kernels.sde_step import SdeStep, sde_step
from fastgrpo_kernels.step_mean import LogProb

__all__ = [
    "GRPOStats",
    "GuidedVelocity",
    "LogProb",
    "MatchingErrors",
    "PhiloxNoise",
    "SdeStep",
    "add_noise",
    "combined",
    "elite_weights",
    "group_advantage",
    "grpo_loss",
    "matching_loss",
    "ode_step",
    "philox_normal",
    "philox_uint32",
    "preprocess_images",
    "refit_moments",
    "sample_candidates",
    "sde_log_prob",
    "sde_step",
]
