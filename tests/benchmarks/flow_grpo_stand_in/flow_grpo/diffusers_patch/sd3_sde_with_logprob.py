"""One reverse step.  t goes to t' < t, v is the velocity; FlowSDE has s = noise_level * sqrt(t / (1 - t)).

    sde   mean = x + (t' - t) (v + s^2 / (2t) (x + (1 - t) v)),  std = s sqrt(t - t'),   log N(x'; mean, std^2)
    cps   mean = (1 - t') x_0 + sqrt(t'^2 - std^2) x_1,  std = t' sin(pi/2 noise_level),  -|x' - mean|^2

with x_0 = x - t v and x_1 = x + (1 - t) v; both are means over the elements of a sample.
"""

import math
from typing import Any

import torch
from torch import Tensor


def sde_step_with_logprob(
    scheduler: Any,
    v: Tensor,
    timestep: Tensor,
    x: Tensor,
    noise_level: float = 0.7,
    prev_sample: Tensor | None = None,
    sde_type: str = "sde",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x', its log_prob, its mean, and s for sde or std for cps."""
    indices = torch.tensor([scheduler.index_for_timestep(one) for one in timestep])
    t, t_next = (scheduler.sigmas[i].view(-1, 1, 1, 1) for i in (indices, indices + 1))
    if sde_type == "sde":
        s = noise_level * torch.sqrt(t / (1 - torch.where(t == 1, scheduler.sigmas[1], t)))
        std = s * torch.sqrt(t - t_next)
        mean = x + (t_next - t) * (v + s**2 / (2 * t) * (x + (1 - t) * v))
        scale, constant = 2 * std**2, std.log() + math.log(2 * math.pi) / 2
    else:
        s = std = t_next * math.sin(math.pi / 2 * noise_level)
        mean = (1 - t_next) * (x - t * v) + torch.sqrt(t_next**2 - std**2) * (x + (1 - t) * v)
        scale, constant = torch.ones_like(std), torch.zeros_like(std)
    x_next = mean + std * torch.randn_like(mean) if prev_sample is None else prev_sample
    log_prob = -((x_next.detach() - mean) ** 2) / scale - constant
    return x_next, log_prob.mean(dim=(1, 2, 3)), mean, s
