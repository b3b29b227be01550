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
from fastgrpo.models.adapter import FlowModel
from fastgrpo.rollout import micro_batches
from fastgrpo.types import Conditions, Trajectories
from fastgrpo_kernels import GRPOStats


@dataclass(frozen=True, kw_only=True)
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
    micro_batch: int
    seed: int

    def __post_init__(self) -> None:
        if self.optimizer_steps < 1:
            raise ValueError(f"train.optimizer_steps must be at least 1, got {self.optimizer_steps}")
        if self.max_grad_norm <= 0:
            raise ValueError(f"train.max_grad_norm must be positive, got {self.max_grad_norm}; use .inf for none")

    def __call__(
        self, trajectories: Trajectories, conditions_B: Conditions, advantages_B: Tensor, iteration: int
    ) -> UpdateStats:
        """``conditions_B`` and ``advantages_B`` have one row a sample."""
        seen: list[tuple[int, Tensor, GRPOStats]] = []
        first_seen, grad_norms = 0, []
        for share in self._shares(len(advantages_B), iteration):
            count = sum(rows.stop - rows.start for rows in share) * len(trajectories.steps)
            for rows in share:
                batch, conditions = trajectories.rows(rows), conditions_B[rows]
                for place in range(len(batch.steps)):
                    log_prob_B, kl_B = self._replay(batch, conditions, place)
                    loss, stats = self.objective(log_prob_B, batch.log_prob_TB[place], advantages_B[rows], kl_B)
                    (loss * (len(log_prob_B) / count)).backward()
                    seen.append((len(log_prob_B), loss.detach(), stats))
            first_seen = first_seen or len(seen)
            grad_norms.append(self._optimizer_step())
        return _summarize(seen, first_seen, torch.stack(grad_norms))

    def _shares(self, num_samples: int, iteration: int) -> list[list[slice]]:
        """The rollout's micro-batches, shuffled, in ``optimizer_steps`` shares."""
        batches = micro_batches(num_samples, self.micro_batch)
        if len(batches) < self.optimizer_steps:
            raise ValueError(
                f"train.optimizer_steps is {self.optimizer_steps} but an iteration has {len(batches)} micro-batches of "
                f"runtime.micro_batch={self.micro_batch}; lower one of them"
            )
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + iteration)
        order = torch.randperm(len(batches), generator=generator).tolist()
        return [[batches[i] for i in order[first :: self.optimizer_steps]] for first in range(self.optimizer_steps)]

    def _replay(self, batch: Trajectories, conditions: Conditions, place: int) -> tuple[Tensor, Tensor]:
        """log_prob and KL [B] of one stored step under the policy as it is now."""
        x_BCHW, step = batch.x_TBCHW[place], batch.steps[place]
        t = self.grid[step]
        v_reference_BCHW = self.model.reference_velocity(x_BCHW, t, conditions) if self.objective.kl_coef > 0 else None
        v_BCHW = self.model.velocity(x_BCHW, t, conditions)
        return self.dynamics(self.grid, step).log_prob(x_BCHW, v_BCHW, batch.x_next_TBCHW[place], v_reference_BCHW)

    def _optimizer_step(self) -> Tensor:
        """Clip, step, and clear; a gradient that is not finite is dropped.  Returns its norm."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        grad_norm = nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        if grad_norm.isfinite():
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return grad_norm


def _summarize(seen: list[tuple[int, Tensor, GRPOStats]], first_seen: int, grad_norms: Tensor) -> UpdateStats:
    sizes, losses, stats = zip(*seen, strict=True)
    weights = torch.tensor(sizes, dtype=torch.float64, device=grad_norms.device) / sum(sizes)

    def mean(values: Iterable[Tensor]) -> float:
        return (weights * torch.stack(list(values))).sum().item()

    finite = grad_norms.isfinite()
    return UpdateStats(
        loss=mean(losses),
        kl=mean(s.kl for s in stats),
        approx_kl=mean(s.approx_kl for s in stats),
        ratio_deviation=torch.stack([s.ratio_deviation for s in stats[:first_seen]]).max().item(),
        clip_fraction=mean(s.clip_fraction for s in stats),
        grad_norm=grad_norms[finite].mean().item() if finite.any() else float("nan"),
        skipped_steps=int((~finite).sum()),
    )
