"""Sampling of which all steps are stochastic and kept."""

from typing import Any

import torch
from torch import Tensor

from .sd3_pipeline_with_logprob_fast import sample


@torch.no_grad()
def pipeline_with_logprob(
    pipeline: Any, *, noise_level: float, **given: Any
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Images, the latents before and after each step, and the log_prob of each."""
    return sample(pipeline, [noise_level] * given["num_inference_steps"], "sde", **given)
