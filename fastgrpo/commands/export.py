"""A finished run's weights for diffusers: the LoRA alone, and on request a whole pipeline with the weights in it."""

import json
from pathlib import Path

from omegaconf import DictConfig

from fastgrpo.commands.output_directory import new_directory
from fastgrpo.commands.trained import load_model


def export(config: DictConfig) -> None:
    """Run a checked ``export`` config and print what reads the result."""
    directory = new_directory(config.output)
    model, origin = load_model(config)
    if not model.has_lora and not config.merged:
        raise ValueError(f"{config.run} trained all weights, so there is no LoRA to export; use merged=true")
    if config.merged and config.model.get("weights") == "random":
        raise ValueError(f"{config.run} is of model.weights=random, a pipeline without text encoders; use merged=false")
    print(f"{origin[0].upper()}{origin[1:]}:")
    if model.has_lora:
        model.save_lora(directory / "lora")
        print(f'  {directory / "lora"}  pipeline.load_lora_weights("{directory / "lora"}")')
    if config.merged:
        model.save_merged(directory / "merged")
        print(f"  {directory / 'merged'}  {_reading(directory / 'merged')}")


def _reading(pipeline: Path) -> str:
    """The call that reads a pipeline's directory."""
    index = json.loads((pipeline / "model_index.json").read_text(encoding="utf-8"))
    # diffusers wants to be told of parts that a pipeline has not, which it cannot see
    absent = "".join(f", {name}=None" for name, part in index.items() if part == [None, None])
    return f'{index["_class_name"]}.from_pretrained("{pipeline}"{absent})'
