"""Trajectories and advantages -> optimizer steps, by replaying the trained steps under gradient.

    ratio = exp(log_prob(policy) - log_prob(old policy))        per sample and trained step
    loss  = mean over samples and trained steps of objective(ratio, advantage, KL to the reference)

A replay runs the same function on the same micro-batch as the rollout did, so before the first optimizer step of an
iteration the ratio is exactly 1; ``health`` stops a run in which it is not.  Source: Flow-GRPO, arXiv:2505.05470.

On several ranks each replays its own samples; gradients are sums over samples, added over the ranks once an optimizer
step and then divided by the number of terms, so that nothing depends on who had how many.
Letters: B samples of this rank, T trained steps, C H W of a latent.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastgrpo.algorithm.dynamics import Dynamics
from fastgrpo.algorithm.objective import ClippedSurrogate
from fastgrpo.distributed.spread import pieces
from fastgrpo.distributed.world import World
from fastgrpo.memory.batch_size import BatchSize
from fastgrpo.memory.batches import Batch, batches, out_of_step
from fastgrpo.models.adapter import FlowModel
from fastgrpo.types import Conditions, SampleGradients, TrainedSteps
from fastgrpo_kernels import GRPOStats

# the rows of each optimizer step, ascending, among the samples of all ranks
Shares = Sequence[Sequence[int]]


class RanksDiffer(RuntimeError):
    """Ranks that have to have the same weights have not."""


@dataclass(frozen=True)
class UpdateStats:
    """Means over the iteration, but ``ratio_deviation``: max |ratio - 1| before its first optimizer step.

    It compares the log_prob of the gradient with the stored one, of every sample and trained step of the first share;
    NaN where a batch did not fit, so that the samples were replayed in smaller ones, which may round otherwise.
    """

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
    world: World = field(default_factory=World)

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
        shares: Shares,
        gradients: Sequence[SampleGradients] = (),
    ) -> UpdateStats:
        """One row a sample of this rank, those of the first of the iteration's ``shares`` first.

        ``gradients`` are those of the ``num_differentiated`` first samples.
        """
        seen: list[_Seen] = []
        grad_norms: list[Tensor] = []
        size, end = self.batch_size.value, 0
        for share, own in zip(shares, pieces(shares, self.world.size)[self.world.rank], strict=True):
            begin, end = end, end + len(own)
            most = -(-len(share) // self.world.size)
            samples = _take(slice(begin, end), trained, conditions_B, advantages_B)
            if grad_norms:
                seen += self._accumulate(*samples, most, is_on_policy=False)
            else:
                # the old policy's branch of guidance is the policy's own until the first optimizer step
                seen = (
                    self._reweight(samples[0], samples[2], gradients)
                    if gradients
                    else self._accumulate(*samples, most, is_on_policy=True)
                )
                deviation = torch.stack([s.stats.ratio_deviation for s in seen]).max()
                deviation = deviation if self.batch_size.value == size else torch.full_like(deviation, math.nan)
            grad_norms.append(self._optimizer_step(num_terms=len(share) * len(trained.steps)))
        return self._summarize(seen, deviation, torch.stack(grad_norms))

    def shares(self, num_samples: int, iteration: int) -> Shares:
        """The samples of each optimizer step, of all ranks, drawn anew in each iteration."""
        if num_samples < self.optimizer_steps * self.world.size:
            raise ValueError(
                f"train.optimizer_steps is {self.optimizer_steps} but an iteration has {num_samples} samples, less "
                f"than one in each step for each of {self.world.size} ranks; lower it, use fewer ranks, or raise "
                "train.prompts_per_iteration or train.group_size"
            )
        if self.optimizer_steps == 1:
            return [list(range(num_samples))]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + iteration)
        order = torch.randperm(num_samples, generator=generator).tolist()
        return [sorted(order[first :: self.optimizer_steps]) for first in range(self.optimizer_steps)]

    def num_differentiated(self, shares: Shares) -> int:
        """Of how many of this rank's first samples the rollout is to take gradients: of the first optimizer step's."""
        return len(pieces(shares, self.world.size)[self.world.rank][0]) if self.reweights else 0

    def _reweight(
        self, trained: TrainedSteps, advantages_B: Tensor, gradients: Sequence[SampleGradients]
    ) -> list["_Seen"]:
        """Leave the gradient of the summed loss: the sum of d loss / d log_prob times d log_prob / d weights.

        On the policy the ratio is 1, where the loss has one derivative a sample for all of its steps.  LeanGRPO (2026).
        """
        log_prob_TB = torch.cat([part.log_prob_TB for part in gradients], dim=1)
        no_kl_B = torch.zeros_like(log_prob_TB[0])
        log_prob_B = log_prob_TB[0].clone().requires_grad_()
        loss, _ = self.objective(log_prob_B, log_prob_B.detach(), advantages_B, no_kl_B)
        (factor_B,) = torch.autograd.grad(loss, log_prob_B, torch.full_like(loss, len(log_prob_B)))
        sizes = [part.log_prob_TB.shape[1] for part in gradients]
        for place, weight in enumerate(self.model.trainable.values()):
            weight.grad = torch.zeros_like(weight)
            for factor_b, part in zip(factor_B.split(sizes), gradients, strict=True):
                weight.grad += torch.tensordot(factor_b.to(weight.dtype), part.weights[place], dims=1)
        # the statistics do not assume that it is: they compare with what was stored
        steps = zip(log_prob_TB, trained.log_prob_TB, strict=True)
        seen = [self.objective(log_prob_B, old_B, advantages_B, no_kl_B) for log_prob_B, old_B in steps]
        return [_Seen(len(advantages_B), loss, stats) for loss, stats in seen]

    def _accumulate(
        self, trained: TrainedSteps, conditions: Conditions, advantages_B: Tensor, most: int, *, is_on_policy: bool
    ) -> list["_Seen"]:
        """Leave the gradient of the summed loss of some samples; begun anew where a batch does not fit in memory."""

        def run(batch: Batch, *, is_last: bool) -> Iterator[_Seen]:
            rows, own = trained.map(lambda part_TB: batch.of(part_TB, dim=1)), batch.conditions(conditions)
            for place in range(len(rows.steps)):
                is_last_pass = is_last and place == len(rows.steps) - 1
                with nullcontext() if is_last_pass else self.model.accumulating():
                    seen = self._backward(rows, place, batch, own, advantages_B, is_on_policy)
                yield seen

        while True:
            try:
                cut = list(batches(len(advantages_B), self.batch_size.value, most, in_step=self.model.in_lockstep))
                return [seen for batch in cut for seen in run(batch, is_last=batch is cut[-1])]
            except torch.OutOfMemoryError as error:
                if self.model.in_lockstep:
                    raise out_of_step(self.batch_size, error) from error
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
        # a sum, whose terms do not depend on how many others there are
        (loss * batch.count).backward()
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

    def _optimizer_step(self, num_terms: int) -> Tensor:
        """Add up over ranks, divide, clip, step, and clear; a gradient that is not finite is dropped.  Its norm."""
        self.model.sum_gradients(lambda gradients: self.world.sum_(gradients, "gradients"))
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        torch._foreach_div_([_local(p.grad) for p in parameters if p.grad is not None], num_terms)
        grad_norm = nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        if isinstance(grad_norm, DTensor):
            grad_norm = grad_norm.full_tensor()
        # a fused optimizer reads this on the device, so that nobody waits to know whether to step
        self.optimizer.found_inf = (~grad_norm.isfinite()).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return grad_norm

    def _summarize(self, seen: list["_Seen"], deviation: Tensor, grad_norms: Tensor) -> UpdateStats:
        """Read everything at once, of all ranks: the only time that an update waits for the device."""
        seen = [s for s in seen if s.num_samples]
        num_terms = torch.tensor([sum(s.num_samples for s in seen)], dtype=torch.float64)
        num_terms = num_terms.to(grad_norms.device, non_blocking=True)
        own = torch.cat(
            [torch.stack([s.sums() for s in seen]).sum(dim=0), num_terms, deviation.double()[None], grad_norms.double()]
        )
        rows = self.world.table(own, "statistics").tolist()
        sums, total = [sum(row[i] for row in rows) for i in range(4)], sum(row[4] for row in rows)
        loss, kl, approx_kl, clip_fraction = (value / total for value in sums)
        norms = [norm for norm in rows[0][6:] if math.isfinite(norm)]
        _check_alike([row[6:] for row in rows])
        return UpdateStats(
            loss=loss,
            kl=kl,
            approx_kl=approx_kl,
            ratio_deviation=_largest([row[5] for row in rows]),
            clip_fraction=clip_fraction,
            # no number where no step was taken
            grad_norm=sum(norms) / len(norms) if norms else math.nan,
            skipped_steps=len(rows[0][6:]) - len(norms),
        )


def _take(
    rows: slice, trained: TrainedSteps, conditions: Conditions, advantages_B: Tensor
) -> tuple[TrainedSteps, Conditions, Tensor]:
    """Some of the samples."""
    return trained.map(lambda part_TB: part_TB[:, rows]), conditions[rows], advantages_B[rows]


@dataclass(frozen=True)
class _Seen:
    """One step of a batch, as the policy that was updated by it saw it."""

    num_samples: int
    loss: Tensor
    stats: GRPOStats

    def sums(self) -> Tensor:
        """Of loss, KL, approximate KL and clipped share over samples."""
        means = torch.stack([self.loss, self.stats.kl, self.stats.approx_kl, self.stats.clip_fraction])
        return means.double() * self.num_samples


def _local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _largest(values: list[float]) -> float:
    return math.nan if any(map(math.isnan, values)) else max(values)


def _check_alike(grad_norms: list[list[float]]) -> None:
    """Ranks have the same weights only as long as they take the same steps: their gradients have the same norm."""
    for rank, norms in enumerate(grad_norms):
        if any(a != b and not (math.isnan(a) and math.isnan(b)) for a, b in zip(norms, grad_norms[0], strict=True)):
            raise RanksDiffer(
                f"rank {rank} took steps of gradients of norm {norms}, rank 0 of {grad_norms[0]}: their weights are no "
                "longer the same; check that all GPUs and libraries are of one kind, and resume from a checkpoint"
            )
