"""The memory plan without a run: for the device of this machine, or for a GPU of a stated size that need not be there.

For a stated size the model has no data: the real architecture at full size, counted without its memory or arithmetic.
"""

import re
from warnings import catch_warnings, simplefilter

from omegaconf import DictConfig
from rich.console import Console

from fastgrpo.algorithm.algorithm import Algorithm
from fastgrpo.memory.byte_count import WithoutData
from fastgrpo.memory.device import CountingMeter
from fastgrpo.memory.model_on_device import plan_device
from fastgrpo.memory.plan import MemoryPlan
from fastgrpo.memory.stages import MemoryPlanner
from fastgrpo.models.adapter import FlowModel
from fastgrpo.parts import build_rewards, read_model, read_prompts
from fastgrpo.pieces import build
from fastgrpo.prompts import longest
from fastgrpo.signals import rehearsal

_UNITS = {"GiB": 2**30, "GB": 10**9, "MiB": 2**20, "MB": 10**6}
HERE = "here"
# fills up whatever a model reads of a text
_LONG_PROMPT = "word " * 1024


def show_plan(config: DictConfig, console: Console) -> None:
    """Print the plan of a checked ``doctor`` config for ``config.memory``; DoesNotFit if there is none."""
    updates = 1 if config.updates is None else config.updates
    if min(config.num_prompts, config.group_size, config.optimizer_steps, updates) < 1:
        raise ValueError(
            "num_prompts, group_size, optimizer_steps and updates must be at least 1: "
            f"{config.num_prompts}, {config.group_size}, {config.optimizer_steps}, {updates}"
        )
    # on a terminal, where nobody else reads it
    with console.status("planning: building the model and counting its stages, some 20 to 60 seconds"):
        plan = measured_plan(config) if config.memory == HERE else counted_plan(config, parse_bytes(config.memory))
    console.print(plan.table())
    how = "measured on this device" if config.memory == HERE else "counted without a device, and without the rewards"
    console.print(
        f"training on {config.num_prompts} prompts x {config.group_size} samples in {config.optimizer_steps} optimizer "
        f"steps, {how}; runtime.micro_batch=0 plans a run like this",
        highlight=False,
    )
    console.print(f"for fastgrpo train: {words_of_training(config)}", highlight=False, soft_wrap=True)


def words_of_training(config: DictConfig) -> str:
    """Of a ``doctor`` config, the sizes of training as ``fastgrpo train`` calls them."""
    words = [f"train.prompts_per_iteration={config.num_prompts}", f"train.group_size={config.group_size}"]
    words += [f"train.optimizer_steps={config.optimizer_steps}"] * (config.optimizer_steps > 1)
    words += [f"train.updates={config.updates}"] * (config.updates is not None)
    return " ".join(words)


def measured_plan(config: DictConfig) -> MemoryPlan:
    """The plan for this machine's device, rewards included."""
    prompts = read_prompts(config, "path")
    algorithm: Algorithm = build(config.algorithm)
    planner = MemoryPlanner(
        algorithm=algorithm,
        make_replay=rehearsal(algorithm),
        samples=config.num_prompts * config.group_size,
        optimizer_steps=config.optimizer_steps,
        updates=config.updates or algorithm.usual_updates,
        rewards=build_rewards(config, prompts)[0],
        prompt=longest(prompts),
    )
    return plan_device(read_model(config, lossy=build(config.lossy)), planner)[1]


def counted_plan(config: DictConfig, memory: int) -> MemoryPlan:
    """The plan for a GPU of ``memory`` bytes; ValueError for a model whose weights would have to be loaded."""
    if (weights := config.model.get("weights")) != "random":
        raise ValueError(
            f"memory={config.memory} counts a model without its weights, and model.weights is {weights}; "
            "add model.weights=random, which a model of real size takes, or use memory=here"
        )
    loras = {"model.lora": config.model.get("lora"), "adaptation.start": config.adaptation.get("start")}
    for key, lora in loras.items():
        if lora is not None:
            raise ValueError(
                f"memory={config.memory} counts a model without weights, and {key}={lora} is a file of some; leave it "
                "out, and give its rank and layers as adaptation.rank and adaptation.targets"
            )
    algorithm: Algorithm = build(config.algorithm)
    planner = MemoryPlanner(
        algorithm=algorithm,
        make_replay=rehearsal(algorithm),
        samples=config.num_prompts * config.group_size,
        optimizer_steps=config.optimizer_steps,
        updates=config.updates or algorithm.usual_updates,
        prompt=_LONG_PROMPT,
    )
    # where it is counted is no matter, but CUDA tensors without a GPU cannot be made
    config.runtime.device = "cpu"
    source = read_model(config, lossy=build(config.lossy))
    meter = CountingMeter()

    def build_counted(checkpointing: bool) -> FlowModel:
        nonlocal meter
        meter, built = CountingMeter(), []
        meter.peak(lambda: built.append(source.with_checkpointing(checkpointing)()))
        with catch_warnings():
            # of FakeTensors, whose addresses FSDP asks for and does not use
            simplefilter("ignore")
            meter.peak(lambda: built[0].shard(None))
        return built[0]

    with WithoutData():
        return planner(build_counted, lambda: meter, memory, source.runtime.checkpointing)[1]


def parse_bytes(text: str) -> int:
    """``80GiB``, ``24GB``, ``512MiB`` in bytes."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([GM]i?B)\s*", text)
    if found is None or float(found[1]) <= 0:
        raise ValueError(f"memory must be a size such as 80GiB or 24GB, or {HERE}, got {text!r}")
    return int(float(found[1]) * _UNITS[found[2]])
