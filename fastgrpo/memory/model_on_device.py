"""The model of a config on its device, in batches that fit there."""

from dataclasses import replace

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from rich.console import Console

from fastgrpo.config import build
from fastgrpo.memory.batches import BatchSizes, even
from fastgrpo.memory.device import meter_of, usable_bytes
from fastgrpo.memory.plan import DECODING, REWARD, SAMPLING, TRAINING, MemoryPlan
from fastgrpo.memory.stages import MemoryPlanner
from fastgrpo.models.adapter import FlowModel
from fastgrpo.models.lossy import Lossy
from fastgrpo.rewards.weighted_sum import Rewards


def build_model(config: DictConfig, lossy: Lossy | None = None) -> FlowModel:
    """The model of a config, on its device; exact where training need not be, unless it is told how."""
    set_threads(config)
    return build(
        config.model,
        adaptation=build(config.adaptation),
        device=device_of(config),
        attention=config.runtime.attention,
        compile=build(config.compile),
        checkpointing=config.runtime.checkpointing,
        lossy=lossy,
    )


def build_planned_model(config: DictConfig, planner: MemoryPlanner) -> tuple[FlowModel, Rewards]:
    """The model, and the rewards in portions that fit beside it.

    Where runtime.micro_batch is 0 the sizes that are 0 are planned from the memory of the device, shown, and written
    into the config, as is checkpointing where it is needed.
    """
    assert planner.rewards is not None
    if config.runtime.micro_batch != 0:
        return build_model(config, lossy=build(config.lossy)), planner.rewards
    model, plan = plan_device(config, planner)
    if not dist.is_initialized() or dist.get_rank() == 0:
        Console().print(plan.table())
    runtime = config.runtime
    runtime.micro_batch = plan.batch(TRAINING)
    runtime.sampling_batch = runtime.sampling_batch or plan.batch(SAMPLING)
    runtime.decode_batch = runtime.decode_batch or plan.batch(DECODING)
    runtime.checkpointing = plan.checkpointing
    if plan.choices[REWARD].fitting >= planner.rewards.scoring.micro_batch:
        return model, planner.rewards
    scoring = replace(planner.rewards.scoring, micro_batch=plan.batch(REWARD))
    return model, replace(planner.rewards, scoring=scoring)


def plan_device(config: DictConfig, planner: MemoryPlanner) -> tuple[FlowModel, MemoryPlan]:
    """The model of a config, and the plan measured with it on its device."""
    lossy, device = build(config.lossy), torch.device(device_of(config))

    def build_with(checkpointing: bool) -> FlowModel:
        config.runtime.checkpointing = checkpointing
        return build_model(config, lossy=lossy)

    return planner(build_with, lambda: meter_of(device), usable_bytes(device), config.runtime.checkpointing)


def build_batch_sizes(config: DictConfig, most_in_share: int = 0, most: int = 0) -> BatchSizes:
    """How many samples run at a time; where the rows of a rank are known, as even as they divide.

    ``most_in_share``, those of an optimizer step, decide in training, so that rollout cuts as the update does.
    """
    runtime = config.runtime
    training, sampling = runtime.micro_batch, runtime.sampling_batch or runtime.micro_batch
    decoding = runtime.decode_batch or runtime.micro_batch
    if training > 0 and most > 0:
        training, sampling = even(most_in_share, training), even(most, sampling)
        decoding = even(sampling, decoding)
    return BatchSizes.of(training, sampling, decoding)


def device_of(config: DictConfig) -> str:
    """``runtime.device``, where auto is CUDA if there is one."""
    device = str(config.runtime.device)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"runtime.device is {device} but PyTorch sees no CUDA device; use runtime.device=cpu")
    # each rank of a machine has its own; by number, since threads begin with the first one
    return f"cuda:{torch.cuda.current_device()}" if device == "cuda" and dist.is_initialized() else device


def set_threads(config: DictConfig) -> None:
    """As many CPU threads as ``runtime.threads`` says."""
    if config.runtime.threads > 0:
        torch.set_num_threads(config.runtime.threads)
