"""Conditions and start noise -> images, and what ``update`` learns from: the algorithm's signal.

``ImageRollout`` follows the ODE to its end and hands on the final latents alone.  ``StepRollout`` hands on trained
steps: these are stochastic, x_next = mean + std * noise with a log-probability; all others follow the ODE.  It is
prefix, window and rest: the window, from the first trained step to the last, is computed as ``update`` replays it, by
the same function on batches of the same size; what is before and after it is only sampled.  Latents stay float32
between steps, so what is replayed is exactly what was stored.
Letters: B samples of this rank, D of them differentiated, T trained steps, C H W of a latent.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fastgrpo.algorithm.dynamics import ODE, Dynamics
from fastgrpo.algorithm.noise import STEP_STREAM
from fastgrpo.algorithm.timesteps import Timesteps
from fastgrpo.memory.batches import Batch
from fastgrpo.on_device import on_device
from fastgrpo.sampler import Sampler, handed_to_nobody
from fastgrpo.types import (
    ChosenNoise,
    Conditions,
    Noise,
    SampleGradients,
    Samples,
    TrainedImages,
    TrainedSteps,
    Trajectories,
)
from fastgrpo_kernels import GuidedVelocity, PhiloxNoise

# (samples, conditions, x, step) -> the noise of the first trained step, or None where it is the plain one
FindNoise = Callable[[Samples, Conditions, Tensor, int], ChosenNoise | None]
# of each trained step, drawn where it is used, or the one that was found
StepNoises = dict[int, PhiloxNoise | Tensor]


def not_searched(samples: Samples, conditions: Conditions, x_BCHW: Tensor, step: int) -> None:
    """Where no step is searched."""


class Rollout(Protocol):
    """What the trainer knows of a rollout."""

    def __call__(
        self,
        samples: Samples,
        conditions: Conditions,
        noise: Noise,
        iteration: int,
        hand_on: Callable[[Tensor], None] = handed_to_nobody,
        *,
        num_differentiated: int = 0,
    ) -> Trajectories[Any]:
        """One trajectory a sample, from its condition and start noise.

        ``hand_on`` is given the images of each batch as soon as they are decoded.  The first ``num_differentiated``
        samples leave the gradient of what was trained of them, where the signal has one.
        """


@dataclass(frozen=True, kw_only=True)
class ImageRollout:
    """The ODE from start to end: any solver and number of steps, nothing stored on the way."""

    sampler: Sampler

    @torch.no_grad()
    def __call__(
        self,
        samples: Samples,
        conditions: Conditions,
        noise: Noise,
        iteration: int,
        hand_on: Callable[[Tensor], None] = handed_to_nobody,
        *,
        num_differentiated: int = 0,
    ) -> Trajectories[TrainedImages]:
        assert num_differentiated == 0, "images have no log_prob whose gradient could be taken here"
        steps = range(self.sampler.num_steps)
        with self.sampler.model.gathered():
            x_0_BCHW, images_BCHW = self.sampler.finished(noise.start_BCHW, conditions, steps, hand_on, samples.most)
        return Trajectories(images_BCHW, noise.start_BCHW, TrainedImages(samples, x_0_BCHW))


@dataclass(frozen=True, kw_only=True)
class StepRollout:
    """Stochastic in the steps that ``timesteps`` chooses for an iteration, whose noise is a function of ``seed``.

    keeps_means: whether the means of the trained steps are handed on, too.  find_noise: a search of the first one's.
    """

    sampler: Sampler
    dynamics: Dynamics
    timesteps: Timesteps
    seed: int
    keeps_means: bool = False
    find_noise: FindNoise = not_searched

    @torch.no_grad()
    def __call__(
        self,
        samples: Samples,
        conditions: Conditions,
        noise: Noise,
        iteration: int,
        hand_on: Callable[[Tensor], None] = handed_to_nobody,
        *,
        num_differentiated: int = 0,
    ) -> Trajectories[TrainedSteps]:
        sampler, start_BCHW = self.sampler, noise.start_BCHW
        steps = self.timesteps(sampler.num_steps, iteration, self.seed)
        first, last = (steps[0], steps[-1] + 1) if steps else (sampler.num_steps,) * 2
        with sampler.model.gathered():
            if noise.is_shared:
                x_BCHW = sampler.latents_of_prompts(samples, conditions, start_BCHW, range(first))
            else:
                x_BCHW = sampler.latents(start_BCHW, conditions, range(first), samples.most)
            step_noise = self._step_noise(samples, steps)
            chosen = self.find_noise(samples, conditions, x_BCHW, first) if steps else None
            if chosen is not None:
                step_noise[first] = chosen.noise_BCHW
            x_BCHW, trained, gradients = self._window(
                x_BCHW, conditions, range(first, last), step_noise, num_differentiated, samples.most
            )
            if chosen is not None:
                trained = trained.chosen_by(chosen)
            rest = range(last, sampler.num_steps)
            _, images_BCHW = sampler.finished(x_BCHW, conditions, rest, hand_on, samples.most)
        return Trajectories(images_BCHW, start_BCHW, trained, gradients, chosen)

    def _window(
        self,
        x_BCHW: Tensor,
        conditions: Conditions,
        steps: range,
        noise: StepNoises,
        num_differentiated: int,
        most: int,
    ) -> tuple[Tensor, TrainedSteps, list[SampleGradients]]:
        """Latents after the window, what is stored of its trained steps, and the gradients that were taken."""
        if num_differentiated in (0, len(x_BCHW)):
            return self._in_window(x_BCHW, conditions, steps, noise, num_differentiated > 0, most)
        parts = [slice(num_differentiated), slice(num_differentiated, None)]
        (x, trained, gradients), (x_others, trained_others, _) = (
            self._in_window(
                x_BCHW[rows],
                conditions[rows],
                steps,
                {step: step_noise[rows] for step, step_noise in noise.items()},
                rows.start is None,
                most,
            )
            for rows in parts
        )
        return torch.cat([x, x_others]), trained.cat(trained_others), gradients

    def _in_window(
        self,
        x_BCHW: Tensor,
        conditions: Conditions,
        steps: range,
        noise: StepNoises,
        with_gradients: bool,
        most: int,
    ) -> tuple[Tensor, TrainedSteps, list[SampleGradients]]:
        """The same of samples that are all differentiated or none of them."""
        if not steps:
            none_TBCHW = x_BCHW.new_empty(0, *x_BCHW.shape)
            none_TB = x_BCHW.new_empty(0, len(x_BCHW))
            return x_BCHW, TrainedSteps((), none_TBCHW, none_TBCHW, none_TB, none_TBCHW, none_TBCHW), []

        def run(batch: Batch) -> tuple[Tensor, TrainedSteps, SampleGradients]:
            step_noise = {
                step: batch.of(n)
                if isinstance(n, Tensor)
                else replace(n, prompt_ids_B=batch.of(n.prompt_ids_B), sample_ids_B=batch.of(n.sample_ids_B))
                for step, n in noise.items()
            }
            x, trained, gradients = self._stochastic(
                batch.of(x_BCHW), batch.conditions(conditions), steps, step_noise, with_gradients
            )
            kept = slice(batch.count)
            return x[kept], trained.map(lambda part_TB: part_TB[:, kept]), gradients.first(batch.count)

        size, before = self.sampler.batch_sizes.training, 0
        parts: list[tuple[Tensor, TrainedSteps, SampleGradients]] = []
        while size.value != before:
            # begun anew where a batch did not fit: update replays all in batches of one size, which round alike
            before = size.value
            parts.clear()
            parts += [part for _, part in self.sampler.cut(len(x_BCHW), size, run, most)]
        x, trained, gradients = zip(*parts, strict=True)
        return torch.cat(x), trained[0].cat(*trained[1:]), list(gradients) if with_gradients else []

    def _stochastic(
        self,
        x_BCHW: Tensor,
        conditions: Conditions,
        steps: range,
        noise: StepNoises,
        with_gradients: bool,
    ) -> tuple[Tensor, TrainedSteps, SampleGradients]:
        x, x_next, log_prob, differentiated, unconditional, mean = [], [], [], [], [], []
        gradients: list[Tensor] = []
        for step in steps:
            if step not in noise:
                v_BCHW = self.sampler.model.velocity(x_BCHW, self.sampler.grid[step], conditions)
                x_BCHW = ODE()(self.sampler.grid, step).mean(x_BCHW, v_BCHW)
                continue
            x.append(x_BCHW)
            if with_gradients:
                x_BCHW, log_prob_B, replayed_B, v_BCHW = self._differentiated(
                    x_BCHW, conditions, step, noise[step], gradients
                )
                differentiated.append(replayed_B)
            else:
                v_BCHW = self.sampler.model.velocity(x_BCHW, self.sampler.grid[step], conditions)
                x_BCHW, log_prob_B = self.dynamics(self.sampler.grid, step).step(x_BCHW, v_BCHW, noise[step])
            x_next.append(x_BCHW)
            log_prob.append(log_prob_B)
            if isinstance(v_BCHW, GuidedVelocity):
                unconditional.append(v_BCHW.unconditional)
            if self.keeps_means:
                mean.append(self.dynamics(self.sampler.grid, step).mean(x[-1], v_BCHW))
        trained = TrainedSteps(
            tuple(noise),
            torch.stack(x),
            torch.stack(x_next),
            torch.stack(log_prob),
            torch.stack(unconditional) if unconditional else x_BCHW.new_empty(0, *x_BCHW.shape),
            torch.stack(mean) if mean else x_BCHW.new_empty(0, *x_BCHW.shape),
        )
        of_TB = torch.stack(differentiated) if differentiated else x_BCHW.new_empty(0, len(x_BCHW))
        return x_BCHW, trained, SampleGradients(of_TB, gradients)

    def _differentiated(
        self, x_BCHW: Tensor, conditions: Conditions, step: int, noise: PhiloxNoise | Tensor, gradients: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | GuidedVelocity]:
        """x_next, its log_prob, the same computed again as update would, and v of one step.

        The gradient of the second log_prob by each sample's weights is added to ``gradients``, empty at first.
        """
        coefficients = self.dynamics(self.sampler.grid, step)
        with self.sampler.model.by_sample(len(x_BCHW)) as weights_B, torch.enable_grad():
            v_BCHW = self.sampler.model.velocity(x_BCHW, self.sampler.grid[step], conditions)
            x_next_BCHW, log_prob_B = coefficients.step(x_BCHW, v_BCHW.detach(), noise)
            replayed_B, _ = coefficients.log_prob(x_BCHW, v_BCHW, x_next_BCHW, None)
            found = torch.autograd.grad(replayed_B.sum(), weights_B, allow_unused=True, materialize_grads=True)
        if gradients:
            torch._foreach_add_(gradients, found)
        else:
            gradients.extend(found)
        return x_next_BCHW, log_prob_B, replayed_B.detach(), v_BCHW.detach()

    def _step_noise(self, samples: Samples, steps: tuple[int, ...]) -> StepNoises:
        """The noise of each step: a function of the global prompt index and the place in the group."""
        prompt_ids_B, places_B = (
            on_device(ids, self.sampler.model.device) for ids in (samples.prompt_ids, samples.places)
        )
        return {step: PhiloxNoise(self.seed, STEP_STREAM + step, prompt_ids_B, places_B) for step in steps}
