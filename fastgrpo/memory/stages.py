"""The stages of an iteration as the memory planner runs them, with a few samples, and the plan made of that.

A stage runs the functions that the iteration runs, on zeros: shapes alone decide how much memory they take.
Letters: B samples, T trained steps, C H W of a latent.
"""

import gc
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastgrpo.algorithm.algorithm import Algorithm
from fastgrpo.compile.cuda_graphs import eagerly
from fastgrpo.memory.batch_size import DoesNotFit
from fastgrpo.memory.byte_count import LargestTensor
from fastgrpo.memory.device import Meter
from fastgrpo.memory.plan import (
    DECODING,
    REWARD,
    SAMPLING,
    TRAINING,
    Cost,
    MemoryPlan,
    Stages,
    measure,
    plan_memory,
)
from fastgrpo.models.adapter import FlowModel, encoded, estimate_decoding
from fastgrpo.out_of_memory import is_out_of_memory, release
from fastgrpo.rewards.weighted_sum import Rewards
from fastgrpo.types import Conditions, Prompt

# kernels count the elements of a tensor in 32 bits, or take slower ways
_MOST_ELEMENTS = 2**31 - 1
# pixels of a forward pass that keep a large GPU busy: 32 images of 512x512, each of 1024 tokens
_ENOUGH_PIXELS = 32 * 512 * 512
# AdamW's two moments and the average, in float32 as the trained weights are
_BYTES_PER_TRAINED = 12
# an old policy that is kept, and the policy while the model holds the old one
_BYTES_PER_LAGGING = 8


class Rehearsed(Protocol):
    """What computes the loss of some samples, as ``fastgrpo.replay`` does."""

    def rehearse(self, x_BCHW: Tensor, conditions: Conditions) -> None:
        """The loss of one step or draw, and its gradient."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlanner:
    """(build, meter, memory) -> the built model and the plan for it.

    samples, optimizer_steps, updates: of an iteration.  make_replay: of a model.  rewards: None leaves them out of the
    plan.  prompt: one that they judge, as long as any.  reweights: whether the rollout takes the gradients of single
    samples, which are kept until the update.  lags: whether the old policy is another than the policy.  keeps_sampling:
    whether what a batch of sampling takes stays in use, as by CUDA graphs.
    """

    algorithm: Algorithm
    make_replay: Callable[[FlowModel], Rehearsed]
    samples: int
    optimizer_steps: int
    updates: int = 1
    rewards: Rewards | None = None
    prompt: Prompt | str = ""
    reweights: bool = False
    lags: bool = False
    keeps_sampling: bool = False

    def __call__(
        self, build: Callable[[bool], FlowModel], meter: Callable[[], Meter], memory: int, checkpointing: bool
    ) -> tuple[FlowModel, MemoryPlan]:
        """``build(checkpointing)`` makes the model, again with checkpointing where it is needed and was not asked for.

        DoesNotFit if there is a stage of which not even one sample fits.
        """
        model = build(checkpointing)
        try:
            # what is compiled would be compiled for sizes that no run has, and over FakeTensors it cannot run
            with eagerly():
                plan = self._plan(model, meter(), memory, checkpointing)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if checkpointing:
                raise DoesNotFit(
                    f"out of memory with one sample: {error}; {_remedy(model)}, or a GPU with more memory"
                ) from error
            release(error)
            plan = None
        if not checkpointing and (plan is None or plan.lacks_room):
            del model
            gc.collect()
            return self(build, meter, memory, checkpointing=True)
        assert plan is not None
        plan.check(_remedy(model))
        return model, plan

    def _plan(self, model: FlowModel, meter: Meter, memory: int, checkpointing: bool) -> MemoryPlan:
        costs: dict[str, Cost] = {}
        with ExitStack() as stack:
            # entered outside of what is measured: merging has a peak of its own, the same for any number of samples
            meter.peak(lambda: stack.enter_context(model.gathered()))
            meter.peak(lambda: stack.enter_context(model.sampling(lossy=True)))
            costs |= measure(self._rollout_stages(model), meter)
            largest = LargestTensor()
            with largest:
                image_1CHW = model.decode(_latents(model, 1))
                estimate_decoding(model)(_latents(model, 1))
        replay = self.make_replay(model)
        costs |= measure({TRAINING: lambda n: replay.rehearse(_latents(model, n), self._conditions(model, n))}, meter)
        for weight in model.trainable.values():
            weight.grad = None
        totals = {SAMPLING: self.samples, TRAINING: max(1, self.samples // self.optimizer_steps)}
        if self.rewards is not None:
            totals[REWARD] = min(self.samples, self.rewards.scoring.micro_batch)
        pixels = math.prod(image_1CHW.shape[-2:]) * (2 if model.has_two_branches else 1)
        return plan_memory(
            costs,
            totals,
            held=self._held(model),
            memory=memory,
            checkpointing=checkpointing,
            enough=max(1, _ENOUGH_PIXELS // pixels),
            most_decoded=max(1, _MOST_ELEMENTS // largest.num_elements),
            keeps_sampling=self.keeps_sampling,
        )

    def _rollout_stages(self, model: FlowModel) -> Stages:
        image_1CHW = model.decode(_latents(model, 1))

        def sample(num_samples: int) -> None:
            model.velocity(_latents(model, num_samples), self.algorithm.grid[0], self._conditions(model, num_samples))

        def decode(num_samples: int) -> None:
            # one after the other, with batches of one size: the larger peak counts
            for decoding in (model.decode, estimate_decoding(model)):
                decoding(_latents(model, num_samples))

        stages: dict[str, Callable[[int], object]] = {SAMPLING: sample, DECODING: decode}
        if (rewards := self.rewards) is not None:
            stages[REWARD] = lambda num_samples: rewards.score(
                image_1CHW.repeat(num_samples, 1, 1, 1), [self.prompt] * num_samples
            )
        return stages

    def _conditions(self, model: FlowModel, num_samples: int) -> Conditions:
        return encoded(model, [self.prompt]).repeat(num_samples)

    def _held(self, model: FlowModel) -> int:
        """Bytes that an iteration keeps beside its stages."""
        x_1CHW, conditions = _latents(model, 1), self._conditions(model, 1)
        num_latents, num_velocities = self.algorithm.kept(self.updates, two_branches=model.has_two_branches)
        # the start noise, the image, and what is learned from
        per_sample = (1 + num_latents) * x_1CHW.nbytes + model.decode(x_1CHW).nbytes
        per_sample += num_velocities * x_1CHW.numel() * conditions.embeds_BLC.element_size()
        per_sample = self.algorithm.images_at_once * per_sample + conditions.num_bytes
        num_trained = sum(_own_part(weight).numel() for weight in model.trainable.values())
        first_share = -(-self.samples // self.optimizer_steps) if self.reweights else 0
        per_trained = _BYTES_PER_TRAINED + 4 * first_share + _BYTES_PER_LAGGING * self.lags
        return self.samples * per_sample + per_trained * num_trained


def _own_part(weight: Tensor) -> Tensor:
    """What this rank holds of it."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def _remedy(model: FlowModel) -> str:
    """What to do where not one sample fits."""
    what = "adaptation.backup=host" if model.has_lora else "adaptation.keep_reference=false, or adaptation=lora"
    return f"lower model.resolution, or use model.dtype=bfloat16 or {what}"


def _latents(model: FlowModel, num_samples: int) -> Tensor:
    return torch.zeros(num_samples, *model.latent_shape, device=model.device)
