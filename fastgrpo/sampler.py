"""Start noise -> latents -> images along the ODE: what a rollout does besides its trained steps, searches, evaluation.

No log-probability is taken of these steps, so they may be lossy and large, with adapters merged into the weights.
Letters: B samples, C H W of a latent.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from fastgrpo.algorithm.solver import Euler, Solver
from fastgrpo.memory.batch_size import BatchSize
from fastgrpo.memory.batches import Batch, BatchSizes, in_batches
from fastgrpo.models.adapter import FlowModel, estimate_decoding
from fastgrpo.on_device import on_device
from fastgrpo.types import Conditions, Samples
from fastgrpo_kernels import GuidedVelocity

Result = TypeVar("Result")


def handed_to_nobody(images_BCHW: Tensor) -> None:
    """Where nobody waits for images."""


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """The ODE of ``grid``, as ``solver`` follows it; nothing that it makes depends on ``batch_sizes`` but rounding.

    estimates: whether its images are a search's, for rewards alone, so that a small decoder will do.
    """

    model: FlowModel
    grid: Sequence[float]
    batch_sizes: BatchSizes
    solver: Solver = field(default_factory=Euler)
    estimates: bool = False

    @property
    def num_steps(self) -> int:
        return len(self.grid) - 1

    @torch.no_grad()
    def __call__(
        self,
        samples: Samples,
        conditions: Conditions,
        start_BCHW: Tensor,
        hand_on: Callable[[Tensor], None] = handed_to_nobody,
    ) -> Tensor:
        """Images of start noises; ``hand_on`` is given those of each batch as soon as they are decoded."""
        with self.model.gathered():
            _, images_BCHW = self.finished(start_BCHW, conditions, range(self.num_steps), hand_on, samples.most)
        return images_BCHW

    def latents(self, x_BCHW: Tensor, conditions: Conditions, steps: range, most: int = 0) -> Tensor:
        """Latents after some of the steps."""
        if not steps:
            return x_BCHW

        def run(batch: Batch) -> Tensor:
            return self._along(batch.of(x_BCHW), batch.conditions(conditions), steps)[: batch.count]

        with self.model.sampling(lossy=True):
            return torch.cat([x for _, x in self.cut(len(x_BCHW), self.batch_sizes.sampling, run, most)])

    def latents_of_prompts(self, samples: Samples, conditions: Conditions, start_BCHW: Tensor, steps: range) -> Tensor:
        """The same where all samples of a prompt start from one noise: each prompt is computed once."""
        # ranks with as many samples have not always as many prompts
        if self.model.in_lockstep:
            return self.latents(start_BCHW, conditions, steps, samples.most)
        first_of: dict[int, int] = {}
        for place, prompt_id in enumerate(samples.prompt_ids):
            first_of.setdefault(prompt_id, place)
        rows = list(first_of.values())
        number = {prompt_id: p for p, prompt_id in enumerate(first_of)}
        rows_P, prompts_B = (
            on_device(index, start_BCHW.device)
            for index in (rows, [number[prompt_id] for prompt_id in samples.prompt_ids])
        )
        return self.latents(start_BCHW[rows_P], conditions.take(rows), steps)[prompts_B]

    def finished(
        self, x_BCHW: Tensor, conditions: Conditions, steps: range, hand_on: Callable[[Tensor], None], most: int
    ) -> tuple[Tensor, Tensor]:
        """Latents at t = 0 after the last steps, and their images, float32 in [0, 1]."""
        x_0, images = zip(*self._finishing(x_BCHW, conditions, steps, hand_on, most), strict=True)
        return torch.cat(x_0), torch.cat(images)

    def handed_on(
        self, x_BCHW: Tensor, conditions: Conditions, steps: range, hand_on: Callable[[Tensor], None], most: int
    ) -> None:
        """The same images for ``hand_on`` alone: no more of them are in memory than a batch has."""
        for _ in self._finishing(x_BCHW, conditions, steps, hand_on, most):
            pass

    def _finishing(
        self, x_BCHW: Tensor, conditions: Conditions, steps: range, hand_on: Callable[[Tensor], None], most: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batch by batch."""

        decode = estimate_decoding(self.model) if self.estimates else self.model.decode

        def run(batch: Batch) -> tuple[Tensor, Tensor]:
            x_0_BCHW = self._along(batch.of(x_BCHW), batch.conditions(conditions), steps)
            decoded = in_batches(len(x_0_BCHW), self.batch_sizes.decoding, lambda part: decode(part.of(x_0_BCHW)))
            images_BCHW = torch.cat([images[: part.count] for part, images in decoded])
            return x_0_BCHW[: batch.count], images_BCHW[: batch.count]

        with self.model.sampling(lossy=True):
            for _, part in self.cut(len(x_BCHW), self.batch_sizes.sampling, run, most):
                hand_on(part[1])
                yield part

    def cut(
        self, total: int, size: BatchSize, run: Callable[[Batch], Result], most: int
    ) -> Iterator[tuple[Batch, Result]]:
        """``run`` of each batch, in step with the other ranks where they share their weights."""
        return in_batches(total, size, run, most, in_step=self.model.in_lockstep)

    def _along(self, x_BCHW: Tensor, conditions: Conditions, steps: range) -> Tensor:
        def velocity(x_BCHW: Tensor, t: float, unconditional: Tensor | None) -> Tensor | GuidedVelocity:
            return self.model.velocity(x_BCHW, t, conditions, unconditional)

        return self.solver(x_BCHW, self.grid, steps, velocity) if steps else x_BCHW
