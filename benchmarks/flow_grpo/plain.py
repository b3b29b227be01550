"""Ours with every optimization off: what it is compared with where there is no checkout of Flow-GRPO.

Adapters are never merged, the branches of guidance are never one batch, nothing that the rollout computed is used again
in the update, groups that share a start noise are sampled apart, and weights are float32 and eager.
"""

from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.flow_grpo.ours import FastGRPO
from benchmarks.flow_grpo.recipe import Job
from fastgrpo.models.adapter import FlowModel
from fastgrpo.rollout import StepRollout
from fastgrpo.step_replay import StepReplay
from fastgrpo.types import Conditions

_OVERRIDES = ("model.dtype=float32", "runtime.attention=sdpa")


class PlainModel:
    """A model that takes no shortcut."""

    def __init__(self, model: FlowModel) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def sampling(self, lossy: bool = False) -> AbstractContextManager[None]:
        return torch.no_grad()

    def velocity(self, x_BCHW: Tensor, t: float, conditions: Conditions, unconditional: Tensor | None = None) -> Any:
        return self._model.velocity(x_BCHW, t, conditions)

    def velocity_and_reference(
        self, x_BCHW: Tensor, t: float, conditions: Conditions, unconditional: Tensor | None = None
    ) -> Any:
        return self._model.velocity_and_reference(x_BCHW, t, conditions)


class PlainFastGRPO(FastGRPO):
    """Our side on such a model."""

    def __init__(self, job: Job, output: Path) -> None:
        super().__init__(job, output, _OVERRIDES)
        trainer = self.trainer
        model: Any = PlainModel(trainer.model)
        trainer.model = model
        rollout, replay = trainer.rollout, trainer.update.replay
        assert isinstance(rollout, StepRollout)
        assert isinstance(replay, StepReplay)
        sampler = replace(rollout.sampler, model=model)
        trainer.rollout = replace(rollout, sampler=sampler)
        trainer.update = replace(trainer.update, model=model, replay=replace(replay, model=model))
        trainer.start_noise = replace(trainer.start_noise, sampler=sampler)
