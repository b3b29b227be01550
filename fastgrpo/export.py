"""A finished run's weights for diffusers: the LoRA alone, and on request a whole pipeline with the weights in it."""

from omegaconf import DictConfig

from fastgrpo.output_directory import new_directory
from fastgrpo.trained import load_model


def export(config: DictConfig) -> None:
    """Run a checked ``export`` config and print what reads the result."""
    directory = new_directory(config.output)
    model, origin = load_model(config)
    if not model.has_lora and not config.merged:
        raise ValueError(f"{config.run} trained all weights, so there is no LoRA to export; use merged=true")
    print(f"{origin}:")
    if model.has_lora:
        model.save_lora(directory / "lora")
        print(f'  {directory / "lora"}  pipeline.load_lora_weights("{directory / "lora"}")')
    if config.merged:
        model.save_merged(directory / "merged")
        print(f'  {directory / "merged"}  StableDiffusion3Pipeline.from_pretrained("{directory / "merged"}")')
