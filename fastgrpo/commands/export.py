"""A finished run's weights for diffusers: the LoRA alone, and on request a whole pipeline with the weights in it."""

from omegaconf import DictConfig

from fastgrpo.commands.output_directory import new_directory
from fastgrpo.commands.trained import load_model


def export(config: DictConfig) -> None:
    """Run a checked ``export`` config and print what reads the result."""
    directory = new_directory(config.output)
    model, origin = load_model(config)
    if not model.has_lora and not config.merged:
        raise ValueError(f"{config.run} trained all weights, so there is no LoRA to export; use merged=true")
    print(f"{origin[0].upper()}{origin[1:]}:")
    if model.has_lora:
        model.save_lora(directory / "lora")
        print(f'  {directory / "lora"}  pipeline.load_lora_weights("{directory / "lora"}")')
    if config.merged:
        model.save_merged(directory / "merged")
        # diffusers wants to be told that a pipeline has no T5, which it cannot see
        has_t5 = (directory / "merged" / "text_encoder_3").is_dir()
        without_t5 = "" if has_t5 else ", text_encoder_3=None, tokenizer_3=None"
        call = f'StableDiffusion3Pipeline.from_pretrained("{directory / "merged"}"{without_t5})'
        print(f"  {directory / 'merged'}  {call}")
