"""``fastgrpo doctor recommend=24GiB``: which models train in that memory, in which batches, and by which command.

Each is planned as ``memory=`` plans one: counted, without its weights, a GPU, or the rewards.  By DiffusionNFT's loss,
which trains without guidance, with each model's own adapters.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from fastgrpo.commands.memory import HERE, counted_plan, parse_bytes, words_of_training
from fastgrpo.composing import config_groups
from fastgrpo.config import load_config
from fastgrpo.memory.batch_size import DoesNotFit
from fastgrpo.memory.device import device_of, usable_bytes
from fastgrpo.memory.plan import TRAINING, MemoryPlan, gib
from fastgrpo.parts import read_runtime

# guidance is an input of this network, not a second branch
_EMBEDS_GUIDANCE = ("flux_dev",)
# what doctor's checks take, and what is planned in its place
_FEW, _USUAL = (2, 4), (8, 8)


@dataclass(frozen=True)
class Recommended:
    """A model, the words of ``fastgrpo train`` that train it, and its plan, or why there is none."""

    model: str
    words: str
    plan: MemoryPlan | None
    why_not: str = ""


def recommend(config: DictConfig, console: Console) -> None:
    """Plan each of ``config.models`` for ``config.recommend``, and print a table and the commands."""
    text = str(config.recommend)
    device = torch.device(device_of(read_runtime(config)))
    if text == HERE and device.type != "cuda":
        raise ValueError("recommend=here is for a GPU, and this machine has none; give a size, as recommend=24GiB")
    memory = usable_bytes(device) if text == HERE else parse_bytes(text)
    if unknown := sorted({*config.models} - {*config_groups("doctor")["model"]}):
        raise ValueError(f"models has {', '.join(unknown)}, of which there is no model=; leave them out")
    found: list[Recommended] = []
    for number, model in enumerate(config.models, start=1):
        said = f"planning {model}, {number} of {len(config.models)}: some 20 to 60 seconds"
        if console.is_terminal:
            with console.status(said):
                found.append(_planned(model, config, memory))
        else:
            console.print(said, highlight=False)
            found.append(_planned(model, config, memory))
    console.print(_table(found, memory))
    for line in _advice(found):
        # whole, to be pasted
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _planned(model: str, config: DictConfig, memory: int) -> Recommended:
    given = (config.num_prompts, config.group_size)
    num_prompts, group_size = _USUAL if given == _FEW else given
    guidance = [] if model in _EMBEDS_GUIDANCE else ["model.guidance_scale=1"]
    sizes = [f"num_prompts={num_prompts}", f"group_size={group_size}", f"optimizer_steps={config.optimizer_steps}"]
    sizes += [f"updates={config.updates}"] if config.updates is not None else []
    asked = load_config("doctor", [f"model={model}", "model.weights=random", *guidance, *sizes])
    words = " ".join([f"model={model}", *guidance, words_of_training(asked)])
    try:
        return Recommended(model, words, counted_plan(asked, memory))
    except DoesNotFit as error:
        return Recommended(model, words, None, str(error))


def _table(found: Sequence[Recommended], memory: int) -> Table:
    table = Table("model", "micro-batch", "fit", "recomputes", "peak", title=f"planned for {gib(memory)}, not measured")
    for one in found:
        if one.plan is None:
            table.add_row(one.model, "does not fit", "", "", "")
            continue
        training = one.plan.choices[TRAINING]
        batch = f"{training.batch} of {training.total}"
        recomputes = "yes" if one.plan.checkpointing else "no"
        table.add_row(one.model, batch, str(training.fitting), recomputes, gib(one.plan.peak_bytes))
    return table


def _advice(found: Sequence[Recommended]) -> Iterator[str]:
    fitting = [one for one in found if one.plan is not None]
    if not fitting:
        yield f"none of them fits; the last: {found[-1].why_not}" if found else "models is empty; name some"
        return
    yield "peaks leave out the rewards. Each of them by NFT, with prompts of your own, batches planned when it starts:"
    for one in fitting:
        yield f"  fastgrpo train {one.words} reward=pick_score prompts.path=train.txt prompts.held_out=test.txt"
