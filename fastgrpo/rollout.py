"""Conditions and start noise -> images, and the trained steps that led to them.

Trained steps are stochastic, x_next = mean + std * noise with a log-probability; all others follow the ODE.  Latents
stay float32 between steps, so what ``update`` replays is exactly what was stored.
Letters: P prompts, G samples of each, B = P * G samples, T trained steps, C H W of a latent.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgrpo.algorithm.dynamics import ODE, Dynamics
from fastgrpo.algorithm.noise import STEP_STREAM
from fastgrpo.models.adapter import FlowModel
from fastgrpo.types import Conditions, Prompts, Trajectories
from fastgrpo_kernels import PhiloxNoise


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Samples the policy.  ``micro_batch`` samples run at a time; the recipe does not depend on it."""

    model: FlowModel
    grid: Sequence[float]
    dynamics: Dynamics
    micro_batch: int
    seed: int

    def __post_init__(self) -> None:
        if self.micro_batch < 1:
            raise ValueError(f"runtime.micro_batch must be at least 1, got {self.micro_batch}")

    @torch.no_grad()
    def __call__(
        self,
        prompts: Prompts,
        conditions: Conditions,
        start_BCHW: Tensor,
        steps: tuple[int, ...],
        hand_on: Callable[[Tensor], None] = lambda images_BCHW: None,
    ) -> Trajectories:
        """One trajectory a start noise [B, C, H, W]; ``steps`` are stochastic and stored.  P rows of conditions.

        ``hand_on`` is given the images of each micro-batch as soon as they are decoded.
        """
        group_size = len(start_BCHW) // len(prompts)
        samples = conditions.repeat(group_size)
        step_noise = self._step_noise(prompts, group_size, steps)
        parts = [
            self._micro_batch(
                start_BCHW[rows], samples[rows], {step: noise[rows] for step, noise in step_noise.items()}, hand_on
            )
            for rows in micro_batches(len(start_BCHW), self.micro_batch)
        ]
        images, x, x_next, log_prob = zip(*parts, strict=True)
        return Trajectories(
            images_BCHW=torch.cat(images),
            x_TBCHW=torch.cat(x, dim=1),
            x_next_TBCHW=torch.cat(x_next, dim=1),
            log_prob_TB=torch.cat(log_prob, dim=1),
            steps=steps,
            start_BCHW=start_BCHW,
        )

    def _micro_batch(
        self,
        x_BCHW: Tensor,
        conditions: Conditions,
        step_noise: dict[int, PhiloxNoise],
        hand_on: Callable[[Tensor], None],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, x_next, log_prob = [], [], []
        for step in range(len(self.grid) - 1):
            v_BCHW = self.model.velocity(x_BCHW, self.grid[step], conditions)
            if step not in step_noise:
                x_BCHW = ODE()(self.grid, step).mean(x_BCHW, v_BCHW)
                continue
            x.append(x_BCHW)
            x_BCHW, log_prob_B = self.dynamics(self.grid, step).step(x_BCHW, v_BCHW, step_noise[step])
            x_next.append(x_BCHW)
            log_prob.append(log_prob_B)
        images_BCHW = self.model.decode(x_BCHW)
        hand_on(images_BCHW)
        none_TBCHW = x_BCHW.new_empty(0, *x_BCHW.shape)
        return (
            images_BCHW,
            torch.stack(x) if x else none_TBCHW,
            torch.stack(x_next) if x_next else none_TBCHW,
            torch.stack(log_prob) if log_prob else none_TBCHW.new_empty(0, len(x_BCHW)),
        )

    def _step_noise(self, prompts: Prompts, group_size: int, steps: tuple[int, ...]) -> dict[int, PhiloxNoise]:
        """The noise of each step: a function of the global prompt index and the place in the group."""
        device = self.model.device
        prompt_ids_B = torch.tensor(prompts.ids, device=device).repeat_interleave(group_size)
        sample_ids_B = torch.arange(group_size, device=device).repeat(len(prompts))
        return {step: PhiloxNoise(self.seed, STEP_STREAM + step, prompt_ids_B, sample_ids_B) for step in steps}


def micro_batches(count: int, size: int) -> list[slice]:
    """The rows [0, count) in slices of at most ``size``.  Rollout and update cut alike, so that rounding is equal."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
