"""Stored steps, replayed under gradient: what is learned from the signal ``steps``.

    ratio = exp(log_prob(policy) - log_prob(old policy))        per sample and trained step, or chunk of steps

A replay runs the function that made a step, on a batch of the same samples: before the first optimizer step of an
iteration the ratio is exactly 1.  Source: Flow-GRPO, arXiv:2505.05470.
Letters: B samples of this rank, T trained steps, C H W of a latent.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastgrpo.algorithm.dynamics import Dynamics
from fastgrpo.algorithm.objective.steps import Replayed, StepObjective
from fastgrpo.models.adapter import FlowModel
from fastgrpo.replay import Term
from fastgrpo.types import Conditions, SampleGradients, TrainedSteps


@dataclass(frozen=True, kw_only=True)
class StepReplay:
    """The stored steps of a rollout, whose material is the trained steps themselves."""

    model: FlowModel
    grid: Sequence[float]
    dynamics: Dynamics
    objective: StepObjective

    deviation_name: ClassVar[str] = "ratio_deviation"

    @property
    def has_log_prob(self) -> bool:
        return not self.objective.needs_distance and max(map(len, self.objective.chunks(len(self.grid) - 1))) == 1

    @property
    def names(self) -> tuple[str, ...]:
        # without a penalty the reference is not run, so there is no KL to log
        return (*(("kl",) if self.objective.kl_coef > 0 else ()), "approx_kl", "clip_fraction")

    @property
    def max_deviation(self) -> float:
        # measured on the embedded model: 0 in float32 and in bfloat16; in batches of 1 in place of 8, which round
        # otherwise, .003 of the clip range in float32 and 4 to 21 of it in bfloat16
        return 0.1 * self.objective.clip_range

    def begin(
        self, trained: TrainedSteps, conditions_B: Conditions, iteration: int, num_updates: int, num_shares: int
    ) -> TrainedSteps:
        return trained

    def num_terms(self, material: TrainedSteps) -> int:
        return len(self.objective.chunks(len(material.steps)))

    def term(
        self, material: TrainedSteps, place: int, conditions: Conditions, advantages_B: Tensor, step: int, update: int
    ) -> Term:
        # the old policy's branch of guidance is the policy's own until the first optimizer step
        is_known, kept = step == 0 and len(material.unconditional_TBCHW) > 0, slice(len(advantages_B))
        chunk = [
            self._replayed(material, i, conditions, material.unconditional_TBCHW[i] if is_known else None, kept)
            for i in self.objective.chunks(len(material.steps))[place]
        ]
        if len(chunk) == 1:
            return self._judged(chunk[0], material.advantages(place, advantages_B))
        return self._judged(_together(chunk), advantages_B)

    def reweighted(
        self,
        material: TrainedSteps,
        advantages_B: Tensor,
        gradients: Sequence[SampleGradients],
    ) -> list[Term]:
        """Leave the gradient of the summed loss: the sum of d loss / d log_prob times d log_prob / d weights.

        On the policy the ratio is 1, where the loss has one derivative a sample for all of its steps.  LeanGRPO (2026).
        """
        log_prob_TB = torch.cat([part.log_prob_TB for part in gradients], dim=1)
        no_kl_B = torch.zeros_like(log_prob_TB[0])
        log_prob_B = log_prob_TB[0].clone().requires_grad_()
        loss, _ = self.objective(Replayed(log_prob_B, log_prob_B.detach(), no_kl_B, no_kl_B), advantages_B)
        (factor_B,) = torch.autograd.grad(loss, log_prob_B, torch.full_like(loss, len(log_prob_B)))
        sizes = [part.log_prob_TB.shape[1] for part in gradients]
        for place, weight in enumerate(self.model.trainable.values()):
            weight.grad = torch.zeros_like(weight)
            for factor_b, part in zip(factor_B.split(sizes), gradients, strict=True):
                weight.grad += torch.tensordot(factor_b.to(weight.dtype), part.weights[place], dims=1)
        # the statistics do not assume that it is: they compare with what was stored
        steps = zip(log_prob_TB, material.log_prob_TB, strict=True)
        return [self._judged(Replayed(own_B, old_B, no_kl_B, no_kl_B), advantages_B) for own_B, old_B in steps]

    def rehearse(self, x_BCHW: Tensor, conditions: Conditions) -> None:
        count, none_B = len(self.grid) - 2, x_BCHW.new_zeros(len(x_BCHW))
        x_TBCHW, none_TB = x_BCHW.expand(count, *x_BCHW.shape), none_B.expand(count, -1)
        trained = TrainedSteps(tuple(range(count)), x_TBCHW, x_TBCHW, none_TB, x_TBCHW[:0], x_TBCHW)
        chunks = self.objective.chunks(count)
        longest = max(range(len(chunks)), key=lambda place: len(chunks[place]))
        self.model.backward(self.term(trained, longest, conditions, none_B, 1, 0).loss)

    def _replayed(
        self, rows: TrainedSteps, place: int, conditions: Conditions, unconditional: Tensor | None, kept: slice
    ) -> Replayed:
        """One stored step under the policy as it is now; ``kept`` are the rows that are not there to fill a batch."""
        x_BCHW, step = rows.x_TBCHW[place], rows.steps[place]
        t = self.grid[step]
        if self.objective.kl_coef > 0:
            v_BCHW, reference_BCHW = self.model.velocity_and_reference(x_BCHW, t, conditions, unconditional)
        else:
            v_BCHW, reference_BCHW = self.model.velocity(x_BCHW, t, conditions, unconditional), None
        coefficients = self.dynamics(self.grid, step)
        log_prob_B, kl_B = coefficients.log_prob(x_BCHW, v_BCHW, rows.x_next_TBCHW[place], reference_BCHW)
        distance_B = torch.zeros_like(log_prob_B)
        if self.objective.needs_distance:
            moved_BCHW = coefficients.mean(x_BCHW, v_BCHW) - rows.mean_TBCHW[place]
            distance_B = moved_BCHW.square().flatten(1).mean(dim=1)
        return Replayed(
            log_prob_B[kept],
            rows.log_prob_TB[place, kept],
            kl_B[kept],
            distance_B[kept],
            std=coefficients.std,
            duration=t - self.grid[step + 1],
            precision=coefficients.precision,
        )

    def _judged(self, replayed: Replayed, advantages_B: Tensor) -> Term:
        loss, stats = self.objective(replayed, advantages_B)
        means = {name: getattr(stats, name) for name in self.names}
        return Term(len(advantages_B), loss, means, stats.ratio_deviation)


def _together(chunk: Sequence[Replayed]) -> Replayed:
    """One ratio of several steps: the geometric mean of theirs."""
    log_prob_B, old_B, kl_B, distance_B = (
        torch.stack([getattr(one, name) for one in chunk]).mean(dim=0)
        for name in ("log_prob_B", "old_log_prob_B", "kl_B", "distance_B")
    )
    return Replayed(log_prob_B, old_B, kl_B, distance_B)
