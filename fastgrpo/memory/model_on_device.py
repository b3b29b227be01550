"""A model on its device, in batches that fit there."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from fastgrpo.compile.cuda_graphs import GraphedForward
from fastgrpo.loading import one_at_a_time
from fastgrpo.memory.device import device_of, meter_of, set_threads, usable_bytes
from fastgrpo.memory.plan import DECODING, REWARD, SAMPLING, TRAINING, MemoryPlan
from fastgrpo.memory.stages import MemoryPlanner
from fastgrpo.models.adaptation import Adaptation
from fastgrpo.models.adapter import FlowModel
from fastgrpo.models.lora import LoRA
from fastgrpo.models.lossy import Lossy
from fastgrpo.models.policy import Compile
from fastgrpo.numerics import set_numerics
from fastgrpo.rewards.weighted_sum import Rewards
from fastgrpo.settings import Runtime


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """What a model is made of.  Called, it loads it onto its device.

    make: the model's class, with what its config says.  lossy: how it may be fast and slightly wrong where training
    need not be exact; None is not at all.
    """

    make: Callable[..., FlowModel]
    adaptation: Callable[..., Adaptation]
    compile: Compile
    runtime: Runtime
    lossy: Lossy | None = None

    def __call__(self) -> FlowModel:
        set_threads(self.runtime)
        set_numerics(deterministic=self.runtime.deterministic)
        with one_at_a_time:
            model = self.make(
                adaptation=self.adaptation,
                device=device_of(self.runtime),
                attention=self.runtime.attention,
                compile=self.compile,
                checkpointing=self.runtime.checkpointing,
                lossy=self.lossy,
            )
        # a model of the user's own; what only the end of a run calls is not to fail there
        if lacking := [name for name in vars(FlowModel) if not name.startswith("_") and name not in dir(model)]:
            raise ValueError(
                f"model._target_: {type(model).__name__} lacks {', '.join(lacking)}; give it all methods of FlowModel, "
                "see fastgrpo/models/adapter.py"
            )
        return model

    @property
    def starts_from_lora(self) -> bool:
        """Whether its adapters are read from a file."""
        return isinstance(self.adaptation, LoRA) and self.adaptation.start is not None

    def going_on(self, adaptation: Mapping[str, Any], *, has_checkpoint: bool) -> "ModelSource":
        """The same in a run that began so and goes on, by its config's ``adaptation``, which has the LoRA's own rank.

        Where it has a checkpoint, that has the adapters, and the LoRA's file is not read again.
        """
        if not isinstance(self.adaptation, LoRA):
            return self
        known = {key: adaptation[key] for key in ("rank", "alpha", "targets") if key in adaptation}
        start = None if has_checkpoint else self.adaptation.start
        return replace(self, adaptation=replace(self.adaptation, **known, start=start))

    def with_checkpointing(self, checkpointing: bool) -> "ModelSource":
        """The same, recomputing blocks in the backward pass or not."""
        return replace(self, runtime=replace(self.runtime, checkpointing=checkpointing))


@dataclass(frozen=True)
class OnDevice:
    """A model that is ready to be trained, rewards in portions that fit beside it, and the runtime with its sizes.

    plan: where these were planned.
    """

    model: FlowModel
    rewards: Rewards
    runtime: Runtime
    plan: MemoryPlan | None = None


def planned_model(source: ModelSource, planner: MemoryPlanner, group: dist.ProcessGroup | None = None) -> OnDevice:
    """The model, spread over the ranks of ``group`` as its adaptation wants it.

    Where micro_batch is 0 the sizes that are 0 are planned from the memory of the device, and shown; so is
    checkpointing where it is needed.
    """
    assert planner.rewards is not None
    runtime = source.runtime
    if runtime.micro_batch != 0:
        model = source()
        model.shard(group)
        return OnDevice(model, planner.rewards, runtime)
    model, plan = plan_device(source, planner, group)
    if not dist.is_initialized() or dist.get_rank() == 0:
        Console().print(plan.table())
    planned = replace(
        runtime,
        micro_batch=plan.batch(TRAINING),
        sampling_batch=runtime.sampling_batch or plan.batch(SAMPLING),
        decode_batch=runtime.decode_batch or plan.batch(DECODING),
        checkpointing=plan.checkpointing,
    )
    if plan.choices[REWARD].fitting >= planner.rewards.scoring.micro_batch:
        return OnDevice(model, planner.rewards, planned, plan)
    scoring = replace(planner.rewards.scoring, micro_batch=plan.batch(REWARD))
    return OnDevice(model, replace(planner.rewards, scoring=scoring), planned, plan)


def plan_device(
    source: ModelSource, planner: MemoryPlanner, group: dist.ProcessGroup | None = None
) -> tuple[FlowModel, MemoryPlan]:
    """The model as it is trained, and the plan measured with it on its device."""
    device = torch.device(device_of(source.runtime))

    def build(checkpointing: bool) -> FlowModel:
        model = source.with_checkpointing(checkpointing)()
        # it is planned for what it is then: weights that are trained become float32
        model.shard(group)
        return model

    planner = replace(planner, keeps_sampling=isinstance(source.compile, GraphedForward))
    memory = _least(usable_bytes(device), device, group)
    return planner(build, lambda: meter_of(device), memory, source.runtime.checkpointing)


def _least(memory: int, device: torch.device, group: dist.ProcessGroup | None) -> int:
    """Of all ranks: those that share weights must come to one plan, since they wait for each other in each pass."""
    if group is None:
        return memory
    least = torch.tensor(memory, device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN, group=group)
    return int(least)
