"""Sampling of which a window of steps, at a random place, is stochastic and kept."""

import random
from typing import Any

import torch
from torch import Tensor

from .sd3_sde_with_logprob import sde_step_with_logprob


@torch.no_grad()
def pipeline_with_logprob(
    pipeline: Any,
    *,
    sde_window_size: int = 0,
    sde_window_range: tuple[int, int] = (0, 5),
    noise_level: float,
    sde_type: str = "sde",
    **given: Any,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """Images; the window's latents, one more than its log_probs and times."""
    first = random.randint(sde_window_range[0], sde_window_range[1] - sde_window_size)
    levels = [noise_level if first <= i < first + sde_window_size else 0.0 for i in range(given["num_inference_steps"])]
    images, latents, log_probs = sample(pipeline, levels, sde_type, **given)
    window = slice(first, first + sde_window_size)
    times = list(pipeline.scheduler.timesteps[window])
    return images, latents[first : first + sde_window_size + 1], log_probs[window], times


def sample(
    pipeline: Any,
    levels: list[float],
    sde_type: str,
    *,
    prompt_embeds: Tensor,
    pooled_prompt_embeds: Tensor,
    negative_prompt_embeds: Tensor,
    negative_pooled_prompt_embeds: Tensor,
    num_inference_steps: int,
    guidance_scale: float,
    output_type: str,
    height: int,
    width: int,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Images, the latents before and after each step, and the log_prob of each, with a noise level a step."""
    is_guided = guidance_scale > 1
    if is_guided:
        prompt_embeds = torch.cat([negative_prompt_embeds, prompt_embeds])
        pooled_prompt_embeds = torch.cat([negative_pooled_prompt_embeds, pooled_prompt_embeds])
    pipeline.scheduler.set_timesteps(num_inference_steps)
    num_samples = len(prompt_embeds) // (1 + is_guided)
    latents = [torch.randn(num_samples, pipeline.transformer.config.in_channels, height // 8, width // 8)]
    log_probs = []
    for t, level in zip(pipeline.scheduler.timesteps, levels, strict=True):
        v = pipeline.transformer(
            hidden_states=torch.cat([latents[-1]] * (1 + is_guided)),
            timestep=t.expand(len(prompt_embeds)),
            encoder_hidden_states=prompt_embeds,
            pooled_projections=pooled_prompt_embeds,
            return_dict=False,
        )[0]
        if is_guided:
            unconditional, conditional = v.chunk(2)
            v = unconditional + guidance_scale * (conditional - unconditional)
        x, log_prob, _, _ = sde_step_with_logprob(
            pipeline.scheduler, v.float(), t[None], latents[-1].float(), noise_level=level, sde_type=sde_type
        )
        latents.append(x)
        log_probs.append(log_prob)
    x_0 = latents[-1] / pipeline.vae.config.scaling_factor + pipeline.vae.config.shift_factor
    images = pipeline.image_processor.postprocess(pipeline.vae.decode(x_0, return_dict=False)[0], output_type)
    return images, latents, log_probs
