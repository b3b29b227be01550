"""Weights for diffusers: of a finished run the LoRA, and on request a whole pipeline with the weights in it.

Of a LoRA that was trained elsewhere the pipeline.  A start noise that a run learned is written beside its weights, for
``fastgrpo sample``.
"""

import re
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from fastgrpo.algorithm.algorithm import Algorithm
from fastgrpo.commands.output_directory import new_directory
from fastgrpo.commands.trained import config_of_run, load_model, load_proposal_of_run
from fastgrpo.files.locations import resolve_path
from fastgrpo.models.adapter import FlowModel
from fastgrpo.pieces import build
from fastgrpo.prompts import load_prompts
from fastgrpo.proposal.files import save_proposal
from fastgrpo.records.model_card import ModelCard

_NUM_STEPS = 10
_PROMPT = "a red circle left of a blue square"


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
    card = _card(config, model, origin)
    # beside what was added to the base model there is nothing trained
    if model.has_lora and config.run:
        model.save_lora(directory / "lora")
        _describe(card, directory / "lora", is_lora=True)
    if config.merged:
        model.save_merged(directory / "merged")
        _describe(card, directory / "merged", is_lora=False)
    if config.run and (proposal := load_proposal_of_run(config.run)) is not None:
        save_proposal(proposal, directory / "proposal")
        print(f"  {directory / 'proposal'}  fastgrpo sample proposal={directory / 'proposal'}")


def _describe(card: ModelCard | None, directory: Path, *, is_lora: bool) -> None:
    """Say what reads the weights, and write it beside them."""
    what = "a LoRA, for diffusers, ComfyUI and peft" if is_lora else "a pipeline of diffusers"
    if card is None:
        print(f"  {directory}  {what}")
        return
    card.write(directory, is_lora=is_lora)
    print(f"  {directory}  {what}; its README.md says what reads it")
    if (directory / "generate.py").is_file():
        print(f"\n{card.pasted(directory, is_lora=is_lora)}\n")


def _card(config: DictConfig, model: FlowModel, origin: str) -> ModelCard | None:
    """None for a model that diffusers cannot draw with."""
    call = getattr(model, "diffusers_call", None)
    if call is None:
        return None
    of_run = config_of_run(config.run) if config.run else {}
    algorithm: Algorithm = build(config.algorithm)
    step = re.search(r"step_(\d+)$", origin)
    return ModelCard(
        call=call,
        times=_times(algorithm, of_run),
        prompt=_prompt(of_run),
        config=of_run,
        iteration=int(step[1]) if step else None,
    )


def _times(algorithm: Algorithm, of_run: dict[str, Any]) -> tuple[float, ...]:
    """Those of the run's evaluations; of a grid that has no other number of steps, its own."""
    try:
        return algorithm.evaluation_grid(of_run.get("evaluate", {}).get("num_steps", _NUM_STEPS))
    except ValueError:
        return algorithm.grid


def _prompt(of_run: dict[str, Any]) -> str:
    """The first that the run was judged by, if its file is still there."""
    try:
        return load_prompts(resolve_path(str(of_run["prompts"]["held_out"])), "prompts.held_out")[0].text
    except (LookupError, ValueError):
        return _PROMPT
