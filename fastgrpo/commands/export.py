"""Weights for diffusers: of a finished run the LoRA, and on request a whole pipeline with the weights in it.

Of a LoRA that was trained elsewhere the pipeline.  A start noise that a run learned is written beside its weights, for
``fastgrpo sample``.
"""

import json
from pathlib import Path

from omegaconf import DictConfig

from fastgrpo.commands.output_directory import new_directory
from fastgrpo.commands.trained import load_model, load_proposal_of_run
from fastgrpo.proposal.files import save_proposal


def export(config: DictConfig) -> None:
    """Run a checked ``export`` config and print what reads the result."""
    if not (config.run or config.lora):
        raise ValueError("nothing to export; give run=outputs/NAME, or lora=DIRECTORY with merged=true")
    if config.lora and not config.merged:
        raise ValueError(f"lora={config.lora} is a LoRA already; use merged=true for a pipeline with it in its weights")
    if config.merged and config.model.get("weights") == "random":
        remedy = "use merged=false" if config.run else "give other weights"
        raise ValueError(
            f"{config.run or 'this'} is of model.weights=random, a pipeline without text encoders; {remedy}"
        )
    directory = new_directory(config.output)
    model, origin = load_model(config)
    if not model.has_lora and not config.merged:
        raise ValueError(f"{config.run} trained all weights, so there is no LoRA to export; use merged=true")
    print(f"{origin[0].upper()}{origin[1:]}:")
    # beside what was added to the base model there is nothing trained
    if model.has_lora and config.run:
        model.save_lora(directory / "lora")
        print(f'  {directory / "lora"}  pipeline.load_lora_weights("{directory / "lora"}")')
    if config.merged:
        model.save_merged(directory / "merged")
        print(f"  {directory / 'merged'}  {_reading(directory / 'merged')}")
    if config.run and (proposal := load_proposal_of_run(config.run)) is not None:
        save_proposal(proposal, directory / "proposal")
        print(f"  {directory / 'proposal'}  fastgrpo sample proposal={directory / 'proposal'}")


def _reading(pipeline: Path) -> str:
    """The call that reads a pipeline's directory."""
    index = json.loads((pipeline / "model_index.json").read_text(encoding="utf-8"))
    # diffusers wants to be told of parts that a pipeline has not, which it cannot see
    absent = "".join(f", {name}=None" for name, part in index.items() if part == [None, None])
    return f'{index["_class_name"]}.from_pretrained("{pipeline}"{absent})'
