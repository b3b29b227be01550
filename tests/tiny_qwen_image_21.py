"""A QwenImage21Pipeline in miniature with random weights: 64x64 images of four channels, two blocks, Qwen3-VL."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage21,
    FlowMatchEulerDiscreteScheduler,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
)
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from fastgrpo.models.text_processor import TextProcessor
from tests.tiny_qwen_image import SCHEDULER, TEXT_WIDTH, make_tokenizer


def make_pipeline(directory: Path, seed: int = 0) -> Path:
    """Write the pipeline's directory in float32; returns it."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": TEXT_WIDTH,
            "intermediate_size": 2 * TEXT_WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "rope_parameters": {"rope_theta": 5e6, "rope_type": "default", "mrope_section": [4, 2, 2]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": TEXT_WIDTH,
            "intermediate_size": TEXT_WIDTH,
            "num_heads": 2,
            "out_hidden_size": TEXT_WIDTH,
            "deepstack_visual_indexes": [0],
        },
    )
    encoder = Qwen3VLForConditionalGeneration(config)
    # the pipeline takes what is before this norm, which is to matter
    torch.nn.init.uniform_(encoder.model.language_model.norm.weight, 0.5, 2.0)
    pipeline = QwenImage21Pipeline(
        transformer=make_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=make_autoencoder(),
        text_encoder=encoder,
        processor=_make_processor(Path(directory) / "processor"),
    )
    pipeline.register_to_config(processor=("transformers", "Qwen3VLProcessor"))
    pipeline.save_pretrained(directory)
    return Path(directory)


def _make_processor(directory: Path) -> TextProcessor:
    make_tokenizer().save_pretrained(directory)
    return TextProcessor.of(directory)


def make_transformer(*, causal_condition: bool = True) -> QwenImage21Transformer2DModel:
    transformer = QwenImage21Transformer2DModel(
        in_channels=8,
        out_channels=8,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 6, 6),
        causal_condition=causal_condition,
    )
    # it is centered at zero, where it starts
    torch.nn.init.normal_(transformer.txt_in.text_norm.weight, std=0.5)
    return transformer


def make_autoencoder() -> AutoencoderKLQwenImage21:
    return AutoencoderKLQwenImage21(
        base_dim=4,
        decoder_base_dim=6,
        z_dim=8,
        dim_mult=[1, 1, 2, 4, 4],
        num_res_blocks=1,
        latents_mean=[0.1 * i for i in range(8)],
        latents_std=[1 + 0.1 * i for i in range(8)],
    )
