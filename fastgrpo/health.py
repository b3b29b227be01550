"""When a run must not go on: a ratio or gradients that are broken.  Letters: B samples of this rank.

Before the first optimizer step of an iteration the policy is the old one, so what rollout and update compute of it must
agree.  Where steps are learned from that is the ratio, which is 1; it is guarded in clip ranges of the run's objective:
beside them any other measure says little, and from one clip range on samples are clipped that never left the policy.
Where images are learned from it is the velocity, of which merged adapters round a little.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from fastgrpo.types import Trajectories
from fastgrpo.update import UpdateStats

MAX_SKIPPED_IN_A_ROW = 3


class TrainingError(RuntimeError):
    """A run that must not go on; the message says what happened, what was saved and what to try."""


class Preempted(TrainingError):
    """A run that was asked to stop by a signal, and is saved."""

    def __init__(self, signal_number: int, iteration: int) -> None:
        super().__init__(
            f"stopped by signal {signal_number} after iteration {iteration}, which is saved; go on with resume=true"
        )
        self.signal_number, self.iteration = signal_number, iteration


@dataclass(kw_only=True)
class Health:
    """Called with each iteration's statistics, which are those of all ranks: they stop together."""

    failed_batch: Path
    skipped_in_a_row: int = field(default=0, init=False)

    def __call__(
        self, iteration: int, stats: UpdateStats, trajectories: Trajectories[Any], advantages_B: Tensor
    ) -> None:
        """TrainingError if rollout and update disagree or gradients stay broken; the batch is saved for study."""
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if stats.skipped_steps else 0
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            why = (
                f"{self.skipped_in_a_row} iterations in a row had gradients that are not finite; "
                "lower train.learning_rate"
            )
        elif not stats.skipped_steps and (stats.deviation or 0.0) > stats.max_deviation:
            why = (
                f"{stats.deviation_name} is {stats.deviation:.2g} before the first optimizer step, where it must be 0 "
                f"within {stats.max_deviation:.2g}: rollout and update disagree; run fastgrpo doctor, or use "
                "model.dtype=float32"
            )
        else:
            return
        kept = vars(trajectories) | vars(trajectories.trained) | {"advantages_B": advantages_B}
        tensors = {name: value for name, value in kept.items() if isinstance(value, Tensor)}
        owned = {name: value.cpu().contiguous() for name, value in tensors.items()}
        safetensors.torch.save_file(owned, self.failed_batch)
        raise TrainingError(f"iteration {iteration}: {why}; its samples are in {self.failed_batch}")
