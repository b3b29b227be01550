"""What a rollout left, and advantages -> optimizer steps, on terms that ``replay`` computes under gradient.

    loss = mean over samples, and over the steps or draws of each, of the objective

An update is a pass over all samples, in ``optimizer_steps`` shares with an optimizer step each.  On several ranks each
takes its own samples; gradients are sums over samples, added over the ranks once an optimizer step and then divided by
the number of terms, so that nothing depends on who had how many.
Letters: B samples of this rank, S optimizer steps of an iteration.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastgrpo.distributed.spread import pieces
from fastgrpo.distributed.world import World
from fastgrpo.learning_rate import LearningRate
from fastgrpo.memory.batch_size import BatchSize
from fastgrpo.memory.batches import Batch, batches, out_of_step
from fastgrpo.models.adapter import FlowModel
from fastgrpo.out_of_memory import is_out_of_memory
from fastgrpo.replay import Replay, Term
from fastgrpo.types import Conditions, SampleGradients, TrainedImages, TrainedSteps

# the rows of each optimizer step of an update, ascending, among the samples of all ranks
Shares = Sequence[Sequence[int]]


# a deviation that nothing was compared for
_UNKNOWN = -1.0


class RanksDiffer(RuntimeError):
    """Ranks that have to have the same weights have not."""


@dataclass(frozen=True)
class UpdateStats:
    """``means`` are over the iteration, but ``drift``: of its last optimizer step, or of the one that was left out.

    ``deviation`` compares rollout and update before the first optimizer step, over all samples of its share and all of
    their ``num_terms``: the largest that was found, None where nothing was compared, NaN where a batch did not fit, so
    that samples were replayed in smaller ones, which may round otherwise.  It is the metric ``deviation_name``.
    """

    means: dict[str, float]
    deviation: float | None
    deviation_name: str
    max_deviation: float
    num_terms: int
    grad_norm: float
    skipped_steps: int
    optimizer_steps: int
    learning_rate: float

    @property
    def metrics(self) -> dict[str, float]:
        """By the names of ``records.metrics.METRICS``."""
        deviation = {} if self.deviation is None else {self.deviation_name: self.deviation}
        others = ("grad_norm", "skipped_steps", "optimizer_steps", "learning_rate")
        return self.means | deviation | {name: getattr(self, name) for name in others}


@dataclass(frozen=True, kw_only=True)
class Update:
    """``updates`` passes of ``optimizer_steps`` AdamW steps on one rollout, each step on its own share of the samples.

    max_drift: the iteration's remaining steps, but never the first, are left out when the mean squared distance of v to
    v_old passes it.  Below infinity the host waits for the device at each step to know it.
    """

    model: FlowModel
    replay: Replay
    optimizer: torch.optim.Optimizer
    optimizer_steps: int
    max_grad_norm: float
    batch_size: BatchSize
    seed: int
    updates: int = 1
    learning_rate: LearningRate | None = None
    max_drift: float = math.inf
    reweights: bool = False
    world: World = field(default_factory=World)

    def __post_init__(self) -> None:
        if self.optimizer_steps < 1:
            raise ValueError(f"train.optimizer_steps must be at least 1, got {self.optimizer_steps}")
        if self.updates < 1:
            raise ValueError(f"train.updates must be at least 1, got {self.updates}")
        if self.max_grad_norm <= 0:
            raise ValueError(f"train.max_grad_norm must be positive, got {self.max_grad_norm}; use .inf for none")
        if self.reweights and not self.replay.has_log_prob:
            raise ValueError(
                "train.gradients=reweight takes the gradient of each step's log_prob while it is rolled out, and this "
                "algorithm learns from images, from chunks of steps, or from their means too; use "
                "train.gradients=replay"
            )
        if self.reweights and (kl_coef := self.replay.objective.kl_coef) > 0:
            raise ValueError(
                f"train.gradients=reweight needs algorithm.objective.kl_coef=0, got {kl_coef}: the penalty's gradient "
                "is not one of log_prob"
            )
        if self.max_drift < math.inf and "drift" not in self.replay.names:
            raise ValueError(
                f"train.max_drift={self.max_drift} bounds the distance of v to v_old, which an algorithm that learns "
                "from steps does not measure; use .inf, and the bound of its objective"
            )

    def __call__(
        self,
        trained: TrainedSteps | TrainedImages,
        conditions_B: Conditions,
        advantages_B: Tensor,
        shares: Shares,
        gradients: Sequence[SampleGradients] = (),
        *,
        iteration: int = 0,
    ) -> UpdateStats:
        """One row a sample of this rank, those of the first of the iteration's ``shares`` first.

        ``gradients`` are those of the ``num_differentiated`` first samples.
        """
        if self.learning_rate is not None:
            self.learning_rate.set(self.optimizer, iteration)
        own = _slices(pieces(shares, self.world.size)[self.world.rank])
        material = self.replay.begin(trained, conditions_B, iteration, self.updates, len(shares))
        num_terms = self.replay.num_terms(material)
        seen: list[list[Term]] = []
        grad_norms: list[Tensor] = []
        size = self.batch_size.value
        for update, share, rows in (
            (update, share, rows) for update in range(self.updates) for share, rows in zip(shares, own, strict=True)
        ):
            samples = material.select(lambda x, dim, rows=rows: x[(slice(None),) * dim + (rows,)])
            if gradients and not seen:
                terms = self.replay.reweighted(samples, advantages_B[rows], gradients)
            else:
                most = -(-len(share) // self.world.size)
                terms = self._accumulate(samples, conditions_B[rows], advantages_B[rows], most, len(seen), update)
            newest = terms
            if seen and self._has_drifted(terms):
                self.optimizer.zero_grad(set_to_none=True)
                break
            seen.append(terms)
            if len(seen) == 1:
                is_halved = self.batch_size.value != size
            grad_norms.append(self._optimizer_step(num_terms=len(share) * num_terms))
        return self._summarize(seen, newest, torch.stack(grad_norms), num_terms, is_halved)

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

    def _accumulate(
        self, material: Any, conditions: Conditions, advantages_B: Tensor, most: int, step: int, update: int
    ) -> list[Term]:
        """Leave the gradient of the summed loss of some samples; begun anew where a batch does not fit in memory."""

        def run(batch: Batch, *, is_last: bool) -> Iterator[Term]:
            rows, own = material.select(batch.of), batch.conditions(conditions)
            advantages = batch.of(advantages_B)[: batch.count]
            num_terms = self.replay.num_terms(material)
            for place in range(num_terms):
                with nullcontext() if is_last and place == num_terms - 1 else self.model.accumulating():
                    term = self.replay.term(rows, place, own, advantages, step, update)
                    # a sum, whose terms do not depend on how many others there are
                    self.model.backward(term.loss * batch.count)
                yield replace(term, loss=term.loss.detach())

        while True:
            try:
                cut = list(batches(len(advantages_B), self.batch_size.value, most, in_step=self.model.in_lockstep))
                return [term for batch in cut for term in run(batch, is_last=batch is cut[-1])]
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if self.model.in_lockstep:
                    raise out_of_step(self.batch_size, error) from error
                self.optimizer.zero_grad(set_to_none=True)
                self.batch_size.halve(error)

    def _has_drifted(self, terms: list[Term]) -> bool:
        """Whether the policy is too far from the old one to be trained on: of all ranks, which must agree."""
        if self.max_drift == math.inf:
            return False
        own = _sums(terms, ("drift",), self.model.device)
        total, count = self.world.table(own, "drift").sum(dim=0).tolist()
        return bool(total > self.max_drift * count)

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
        # a fused step does not say that it changed them, and copies follow those who do
        torch.autograd.graph.increment_version(parameters)
        self.optimizer.zero_grad(set_to_none=True)
        return grad_norm

    def _summarize(
        self, seen: list[list[Term]], newest: list[Term], grad_norms: Tensor, num_terms: int, is_halved: bool
    ) -> UpdateStats:
        """Read everything at once, of all ranks: the only time that an update waits for the device.

        ``newest`` are the terms of the last step, taken or not.
        """
        # over all optimizer steps, and over the last one alone
        spans = [(tuple(name for name in ("loss", *self.replay.names) if name != "drift"), list(chain(*seen)))]
        if "drift" in self.replay.names:
            spans.append((("drift",), newest))
        sums = [_sums(terms, names, grad_norms.device) for names, terms in spans]
        own = torch.cat([*sums, self._deviation(seen[0], grad_norms.device, is_halved)[None], grad_norms.double()])
        rows = self.world.table(own, "statistics").tolist()
        means: dict[str, float] = {}
        first = 0
        for names, _ in spans:
            *totals, count = (sum(row[first + i] for row in rows) for i in range(len(names) + 1))
            means |= {name: total / count for name, total in zip(names, totals, strict=True)}
            first += len(names) + 1
        _check_alike([row[first + 1 :] for row in rows])
        deviation = _largest([row[first] for row in rows])
        norms = [norm for norm in rows[0][first + 1 :] if math.isfinite(norm)]
        return UpdateStats(
            means=means,
            deviation=None if deviation == _UNKNOWN else deviation,
            deviation_name=self.replay.deviation_name,
            max_deviation=self.replay.max_deviation,
            num_terms=num_terms,
            # no number where no step was taken
            grad_norm=sum(norms) / len(norms) if norms else math.nan,
            skipped_steps=len(seen) - len(norms),
            optimizer_steps=len(norms),
            learning_rate=self.optimizer.param_groups[0]["lr"],
        )

    def _deviation(self, terms: list[Term], device: torch.device, is_halved: bool) -> Tensor:
        """The largest that this rank found, ``_UNKNOWN`` where it compared nothing."""
        found = [term.deviation for term in terms if term.deviation is not None and term.num_samples]
        if not found or is_halved:
            return torch.full((), math.nan if found else _UNKNOWN, dtype=torch.float64, device=device)
        return torch.stack(found).max().double()


def _slices(rows: Sequence[Sequence[int]]) -> list[slice]:
    """Where each share begins and ends, one after the other."""
    ends = list(accumulate(map(len, rows)))
    return [slice(end - len(own), end) for own, end in zip(rows, ends, strict=True)]


def _sums(terms: Sequence[Term], names: Sequence[str], device: torch.device) -> Tensor:
    """Of the means over samples, and the number of these."""
    terms = [term for term in terms if term.num_samples]
    # filled there: nothing is copied
    count = torch.full((1,), sum(term.num_samples for term in terms), dtype=torch.float64, device=device)
    if not terms:
        return torch.cat([count.new_zeros(len(names)), count])
    sums = [torch.stack([{"loss": t.loss, **t.means}[name] for name in names]).double() * t.num_samples for t in terms]
    return torch.cat([torch.stack(sums).sum(dim=0), count])


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
