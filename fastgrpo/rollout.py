"""Conditions and start noise -> images, and the trained steps that led to them.

Trained steps are stochastic, x_next = mean + std * noise with a log-probability; all others follow the ODE.  A rollout
is prefix, window and rest: the window, from the first trained step to the last, is computed as ``update`` replays it,
by the same function on batches of the same size; what is before and after it is only sampled.  Latents stay float32
between steps, so what is replayed is exactly what was stored.
Letters: B samples of this rank, D of them differentiated, T trained steps, C H W of a latent.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from fastgrpo.algorithm.dynamics import ODE, Dynamics
from fastgrpo.algorithm.noise import STEP_STREAM
from fastgrpo.algorithm.solver import Euler, Solver
from fastgrpo.memory.batch_size import BatchSize
from fastgrpo.memory.batches import Batch, BatchSizes, in_batches
from fastgrpo.models.adapter import FlowModel
from fastgrpo.types import Conditions, SampleGradients, Samples, TrainedSteps, Trajectories
from fastgrpo_kernels import GuidedVelocity, PhiloxNoise

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Samples the policy.  The recipe does not depend on ``batch_sizes``; ``solver`` is that of prefix and rest."""

    model: FlowModel
    grid: Sequence[float]
    dynamics: Dynamics
    batch_sizes: BatchSizes
    seed: int
    solver: Solver = field(default_factory=Euler)

    @torch.no_grad()
    def __call__(
        self,
        samples: Samples,
        conditions: Conditions,
        start_BCHW: Tensor,
        steps: tuple[int, ...],
        hand_on: Callable[[Tensor], None] = lambda images_BCHW: None,
        *,
        is_shared: bool = False,
        num_differentiated: int = 0,
    ) -> Trajectories:
        """One trajectory a sample, from its condition and start noise; ``steps`` are stochastic and stored.

        ``hand_on`` is given the images of each batch as soon as they are decoded.  ``is_shared`` says that all samples
        of a prompt start from one noise: they are one until the first stochastic step.  The first
        ``num_differentiated`` samples leave the gradient of their log_prob, taken while they are made, so that update
        need not replay them.
        """
        end = len(self.grid) - 1
        first, last = (steps[0], steps[-1] + 1) if steps else (end, end)
        with self.model.gathered():
            x_BCHW = self._prefix(samples, conditions, start_BCHW, range(first), is_shared)
            noise = self._step_noise(samples, steps)
            x_BCHW, trained, gradients = self._window(
                x_BCHW, conditions, range(first, last), noise, num_differentiated, samples.most
            )
            images_BCHW = self._images(x_BCHW, conditions, range(last, end), hand_on, samples.most)
        return Trajectories(images_BCHW, start_BCHW, trained, gradients)

    def _prefix(
        self,
        samples: Samples,
        conditions: Conditions,
        start_BCHW: Tensor,
        steps: range,
        is_shared: bool,
    ) -> Tensor:
        """Latents after the steps of the ODE before the window, of each prompt once where its start is shared."""
        # ranks with as many samples have not always as many prompts
        if not is_shared or self.model.in_lockstep:
            return self._deterministic(start_BCHW, conditions, steps, samples.most)
        first_of: dict[int, int] = {}
        for place, prompt_id in enumerate(samples.prompt_ids):
            first_of.setdefault(prompt_id, place)
        rows = list(first_of.values())
        number = {prompt_id: p for p, prompt_id in enumerate(first_of)}
        rows_P, prompts_B = (
            torch.tensor(index).to(start_BCHW.device, non_blocking=True)
            for index in (rows, [number[prompt_id] for prompt_id in samples.prompt_ids])
        )
        return self._deterministic(start_BCHW[rows_P], conditions.take(rows), steps)[prompts_B]

    def _deterministic(self, x_BCHW: Tensor, conditions: Conditions, steps: range, most: int = 0) -> Tensor:
        """Latents after some steps of the ODE."""
        if not steps:
            return x_BCHW

        def run(batch: Batch) -> Tensor:
            return self._ode(batch.of(x_BCHW), batch.conditions(conditions), steps)[: batch.count]

        with self.model.sampling(lossy=True):
            return torch.cat([x for _, x in self._cut(len(x_BCHW), self.batch_sizes.sampling, run, most)])

    def _window(
        self,
        x_BCHW: Tensor,
        conditions: Conditions,
        steps: range,
        noise: dict[int, PhiloxNoise],
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
        noise: dict[int, PhiloxNoise],
        with_gradients: bool,
        most: int,
    ) -> tuple[Tensor, TrainedSteps, list[SampleGradients]]:
        """The same of samples that are all differentiated or none of them."""
        if not steps:
            none_TBCHW = x_BCHW.new_empty(0, *x_BCHW.shape)
            none_TB = x_BCHW.new_empty(0, len(x_BCHW))
            return x_BCHW, TrainedSteps((), none_TBCHW, none_TBCHW, none_TB, none_TBCHW), []

        def run(batch: Batch) -> tuple[Tensor, TrainedSteps, SampleGradients]:
            step_noise = {
                step: replace(n, prompt_ids_B=batch.of(n.prompt_ids_B), sample_ids_B=batch.of(n.sample_ids_B))
                for step, n in noise.items()
            }
            x, trained, gradients = self._stochastic(
                batch.of(x_BCHW), batch.conditions(conditions), steps, step_noise, with_gradients
            )
            kept = slice(batch.count)
            return x[kept], trained.map(lambda part_TB: part_TB[:, kept]), gradients.first(batch.count)

        size, before = self.batch_sizes.training, 0
        parts: list[tuple[Tensor, TrainedSteps, SampleGradients]] = []
        while size.value != before:
            # begun anew where a batch did not fit: update replays all in batches of one size, which round alike
            before = size.value
            parts.clear()
            parts += [part for _, part in self._cut(len(x_BCHW), size, run, most)]
        x, trained, gradients = zip(*parts, strict=True)
        return torch.cat(x), trained[0].cat(*trained[1:]), list(gradients) if with_gradients else []

    def _stochastic(
        self,
        x_BCHW: Tensor,
        conditions: Conditions,
        steps: range,
        noise: dict[int, PhiloxNoise],
        with_gradients: bool,
    ) -> tuple[Tensor, TrainedSteps, SampleGradients]:
        x, x_next, log_prob, differentiated, unconditional = [], [], [], [], []
        gradients: list[Tensor] = []
        for step in steps:
            if step not in noise:
                v_BCHW = self.model.velocity(x_BCHW, self.grid[step], conditions)
                x_BCHW = ODE()(self.grid, step).mean(x_BCHW, v_BCHW)
                continue
            x.append(x_BCHW)
            if with_gradients:
                x_BCHW, log_prob_B, replayed_B, v_BCHW = self._differentiated(
                    x_BCHW, conditions, step, noise[step], gradients
                )
                differentiated.append(replayed_B)
            else:
                v_BCHW = self.model.velocity(x_BCHW, self.grid[step], conditions)
                x_BCHW, log_prob_B = self.dynamics(self.grid, step).step(x_BCHW, v_BCHW, noise[step])
            x_next.append(x_BCHW)
            log_prob.append(log_prob_B)
            if isinstance(v_BCHW, GuidedVelocity):
                unconditional.append(v_BCHW.unconditional)
        trained = TrainedSteps(
            tuple(noise),
            torch.stack(x),
            torch.stack(x_next),
            torch.stack(log_prob),
            torch.stack(unconditional) if unconditional else x_BCHW.new_empty(0, *x_BCHW.shape),
        )
        of_TB = torch.stack(differentiated) if differentiated else x_BCHW.new_empty(0, len(x_BCHW))
        return x_BCHW, trained, SampleGradients(of_TB, gradients)

    def _differentiated(
        self, x_BCHW: Tensor, conditions: Conditions, step: int, noise: PhiloxNoise, gradients: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | GuidedVelocity]:
        """x_next, its log_prob, the same computed again as update would, and v of one step.

        The gradient of the second log_prob by each sample's weights is added to ``gradients``, empty at first.
        """
        coefficients = self.dynamics(self.grid, step)
        with self.model.by_sample(len(x_BCHW)) as weights_B, torch.enable_grad():
            v_BCHW = self.model.velocity(x_BCHW, self.grid[step], conditions)
            x_next_BCHW, log_prob_B = coefficients.step(x_BCHW, v_BCHW.detach(), noise)
            replayed_B, _ = coefficients.log_prob(x_BCHW, v_BCHW, x_next_BCHW, None)
            found = torch.autograd.grad(replayed_B.sum(), weights_B, allow_unused=True, materialize_grads=True)
        if gradients:
            torch._foreach_add_(gradients, found)
        else:
            gradients.extend(found)
        return x_next_BCHW, log_prob_B, replayed_B.detach(), v_BCHW.detach()

    def _images(
        self, x_BCHW: Tensor, conditions: Conditions, steps: range, hand_on: Callable[[Tensor], None], most: int
    ) -> Tensor:
        """The rest of the ODE, and what it leads to."""

        def run(batch: Batch) -> Tensor:
            x_0_BCHW = self._ode(batch.of(x_BCHW), batch.conditions(conditions), steps)
            decoded = in_batches(
                len(x_0_BCHW), self.batch_sizes.decoding, lambda part: self.model.decode(part.of(x_0_BCHW))
            )
            return torch.cat([images[: part.count] for part, images in decoded])[: batch.count]

        images: list[Tensor] = []
        with self.model.sampling(lossy=True):
            for _, images_BCHW in self._cut(len(x_BCHW), self.batch_sizes.sampling, run, most):
                hand_on(images_BCHW)
                images.append(images_BCHW)
        return torch.cat(images)

    def _cut(
        self, total: int, size: BatchSize, run: Callable[[Batch], Result], most: int
    ) -> Iterator[tuple[Batch, Result]]:
        return in_batches(total, size, run, most, in_step=self.model.in_lockstep)

    def _ode(self, x_BCHW: Tensor, conditions: Conditions, steps: range) -> Tensor:
        def velocity(x_BCHW: Tensor, t: float, unconditional: Tensor | None) -> Tensor | GuidedVelocity:
            return self.model.velocity(x_BCHW, t, conditions, unconditional)

        return self.solver(x_BCHW, self.grid, steps, velocity)

    def _step_noise(self, samples: Samples, steps: tuple[int, ...]) -> dict[int, PhiloxNoise]:
        """The noise of each step: a function of the global prompt index and the place in the group."""
        prompt_ids_B, places_B = (
            torch.tensor(ids).to(self.model.device, non_blocking=True) for ids in (samples.prompt_ids, samples.places)
        )
        return {step: PhiloxNoise(self.seed, STEP_STREAM + step, prompt_ids_B, places_B) for step in steps}
