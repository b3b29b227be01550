"""Trajectories and advantages -> optimizer steps, by replaying the trained steps under gradient.

    ratio = exp(log_prob(policy) - log_prob(old policy))        per sample and trained step
    loss  = mean over samples and trained steps of objective(ratio, advantage, KL to the reference)

A replay runs the same function on the same micro-batch as the rollout did, so before the first optimizer step of an
iteration the ratio is exactly 1 in float32.  Source: Flow-GRPO, arXiv:2505.05470.
Letters: B samples, T trained steps, C H W of a latent.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastgrpo.algorithm.dynamics import Dynamics
from fastgrpo.algorithm.objective import ClippedSurrogate
from fastgrpo.batches import Batch, batches
from fastgrpo.models.adapter import FlowModel
from fastgrpo.runtime.batch_size import BatchSize
from fastgrpo.types import Conditions, TrainedSteps
from fastgrpo_kernels import GRPOStats


@dataclass(frozen=True)
class UpdateStats:
    """Means over the iteration, but ``ratio_deviation``: max |ratio - 1| before its first optimizer step."""

    loss: float
    kl: float
    approx_kl: float
    ratio_deviation: float
    clip_fraction: float
    grad_norm: float
    skipped_steps: int


@dataclass(frozen=True, kw_only=True)
class Update:
    """``optimizer_steps`` AdamW steps on one rollout, each on its own share of the samples."""

    model: FlowModel
    grid: Sequence[float]
    dynamics: Dynamics
    objective: ClippedSurrogate
    optimizer: torch.optim.Optimizer
    optimizer_steps: int
    max_grad_norm: float
    batch_size: BatchSize
    seed: int
    reweights: bool = False

    def __post_init__(self) -> None:
        if self.optimizer_steps < 1:
            raise ValueError(f"train.optimizer_steps must be at least 1, got {self.optimizer_steps}")
        if self.max_grad_norm <= 0:
            raise ValueError(f"train.max_grad_norm must be positive, got {self.max_grad_norm}; use .inf for none")
        if self.reweights and self.objective.kl_coef > 0:
            raise ValueError(
                f"train.gradients=reweight needs algorithm.objective.kl_coef=0, got {self.objective.kl_coef}: the "
                "penalty's gradient is not one of log_prob"
            )

    def __call__(
        self,
        trained: TrainedSteps,
        conditions_B: Conditions,
        advantages_B: Tensor,
        iteration: int,
        gradients: Sequence[Sequence[Tensor]] = (),
    ) -> UpdateStats:
        """``conditions_B`` and ``advantages_B`` have one row a sample; ``gradients`` are of the ``differentiated``."""
        first: list[_Seen] = []
        others: list[_Seen] = []
        grad_norms = []
        for rows in self._shares(len(advantages_B), iteration):
            share = trained, conditions_B, advantages_B
            if len(rows) < len(advantages_B):
                share = _take(rows, *share)
            if first:
                others += self._accumulate(*share, is_on_policy=False)
            elif gradients:
                first = [self._reweight(share[0], share[2], gradients)]
            else:
                # the old policy's branch of guidance is the policy's own until the first optimizer step
                first = self._accumulate(*share, is_on_policy=True)
            grad_norms.append(self._optimizer_step())
        return _summarize(first, others, torch.stack(grad_norms))

    def differentiated(self, num_samples: int, iteration: int) -> list[int]:
        """The samples whose gradients the rollout is to take: those of the first optimizer step, if any."""
        return self._shares(num_samples, iteration)[0] if self.reweights else []

    def _shares(self, num_samples: int, iteration: int) -> list[list[int]]:
        """The samples of each optimizer step, drawn anew in each iteration: whatever the micro-batch."""
        if num_samples < self.optimizer_steps:
            raise ValueError(
                f"train.optimizer_steps is {self.optimizer_steps} but an iteration has {num_samples} samples; "
                "lower it, or raise train.prompts_per_iteration or train.group_size"
            )
        if self.optimizer_steps == 1:
            return [list(range(num_samples))]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + iteration)
        order = torch.randperm(num_samples, generator=generator).tolist()
        return [order[first :: self.optimizer_steps] for first in range(self.optimizer_steps)]

    def _reweight(self, trained: TrainedSteps, advantages_B: Tensor, gradients: Sequence[Sequence[Tensor]]) -> "_Seen":
        """Leave the gradient of the mean loss: the sum of d loss / d log_prob times d log_prob / d weights.

        On the policy the ratio is 1, where the loss has one derivative a sample for all of its steps.  LeanGRPO (2026).
        """
        old_B = trained.log_prob_TB[0]
        log_prob_B = old_B.clone().requires_grad_()
        loss, stats = self.objective(log_prob_B, old_B, advantages_B, torch.zeros_like(old_B))
        (factor_B,) = torch.autograd.grad(loss, log_prob_B)
        factor_B = factor_B / len(trained.steps)
        sizes = [len(part[0]) for part in gradients]
        for place, weight in enumerate(self.model.trainable.values()):
            weight.grad = torch.zeros_like(weight)
            for factor_b, part in zip(factor_B.split(sizes), gradients, strict=True):
                weight.grad += torch.tensordot(factor_b, part[place], dims=1)
        return _Seen(len(advantages_B), loss.detach(), stats)

    def _accumulate(
        self, trained: TrainedSteps, conditions: Conditions, advantages_B: Tensor, *, is_on_policy: bool
    ) -> list["_Seen"]:
        """Leave the gradient of the mean loss of some samples; begun anew where a batch does not fit in memory."""

        def run(batch: Batch) -> list[_Seen]:
            rows = trained.map(lambda part_TB: batch.of(part_TB, dim=1))
            return [
                self._backward(rows, place, batch, batch.conditions(conditions), advantages_B, is_on_policy)
                for place in range(len(trained.steps))
            ]

        while True:
            try:
                return [seen for batch in batches(len(advantages_B), self.batch_size.value) for seen in run(batch)]
            except torch.OutOfMemoryError as error:
                self.optimizer.zero_grad(set_to_none=True)
                self.batch_size.halve(error)

    def _backward(
        self,
        rows: TrainedSteps,
        place: int,
        batch: Batch,
        conditions: Conditions,
        advantages_B: Tensor,
        is_on_policy: bool,
    ) -> "_Seen":
        """Add one step's gradient of one batch."""
        is_guided_on_policy = is_on_policy and len(rows.unconditional_TBCHW) > 0
        log_prob_B, kl_B = self._replay(
            rows, place, conditions, rows.unconditional_TBCHW[place] if is_guided_on_policy else None
        )
        kept = slice(batch.count)
        loss, stats = self.objective(
            log_prob_B[kept], rows.log_prob_TB[place, kept], batch.of(advantages_B)[kept], kl_B[kept]
        )
        (loss * (batch.count / (len(advantages_B) * len(rows.steps)))).backward()
        return _Seen(batch.count, loss.detach(), stats)

    def _replay(
        self, rows: TrainedSteps, place: int, conditions: Conditions, unconditional: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """log_prob and KL [B] of one stored step under the policy as it is now."""
        x_BCHW, step = rows.x_TBCHW[place], rows.steps[place]
        t = self.grid[step]
        if self.objective.kl_coef > 0:
            v_BCHW, reference_BCHW = self.model.velocity_and_reference(x_BCHW, t, conditions, unconditional)
        else:
            v_BCHW, reference_BCHW = self.model.velocity(x_BCHW, t, conditions, unconditional), None
        return self.dynamics(self.grid, step).log_prob(x_BCHW, v_BCHW, rows.x_next_TBCHW[place], reference_BCHW)

    def _optimizer_step(self) -> Tensor:
        """Clip, step, and clear; a gradient that is not finite is dropped.  Returns its norm."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        grad_norm = nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        # a fused optimizer reads this on the device, so that nobody waits to know whether to step
        self.optimizer.found_inf = (~grad_norm.isfinite()).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return grad_norm


def _take(
    rows: list[int], trained: TrainedSteps, conditions: Conditions, advantages_B: Tensor
) -> tuple[TrainedSteps, Conditions, Tensor]:
    """Some of the samples."""
    index = torch.tensor(rows).to(advantages_B.device, non_blocking=True)
    return trained.map(lambda part_TB: part_TB.index_select(1, index)), conditions.take(rows), advantages_B[index]


@dataclass(frozen=True)
class _Seen:
    """One step of a batch, as the policy that was updated by it saw it."""

    num_samples: int
    loss: Tensor
    stats: GRPOStats


def _summarize(first: list[_Seen], others: list[_Seen], grad_norms: Tensor) -> UpdateStats:
    """Read everything at once: the only time that an update waits for the device."""
    seen = first + others
    num_samples = torch.tensor([s.num_samples for s in seen], dtype=torch.float64)
    weights = (num_samples / num_samples.sum()).to(grad_norms.device, non_blocking=True)

    def mean(values: Iterable[Tensor]) -> Tensor:
        return (weights * torch.stack(list(values))).sum()

    finite = grad_norms.isfinite()
    values = torch.stack(
        [
            mean(s.loss for s in seen),
            mean(s.stats.kl for s in seen),
            mean(s.stats.approx_kl for s in seen),
            torch.stack([s.stats.ratio_deviation for s in first]).max().double(),
            mean(s.stats.clip_fraction for s in seen),
            # 0 / 0 where no step was taken
            torch.where(finite, grad_norms, 0.0).double().sum() / finite.sum(),
            (~finite).sum().double(),
        ]
    )
    *means, skipped_steps = values.tolist()
    loss, kl, approx_kl, ratio_deviation, clip_fraction, grad_norm = means
    return UpdateStats(loss, kl, approx_kl, ratio_deviation, clip_fraction, grad_norm, int(skipped_steps))
