"""A StableDiffusion3Pipeline in miniature with random weights: what the tests train (its config: tiny_config.py).

32x32 images, latents [16, 4, 4], two blocks of width 32: a forward pass takes milliseconds.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedModel, PreTrainedTokenizerBase

from fastgrpo.shapes.pretrain.tokenizer import train_tokenizer

TEXT_WIDTH = 16
RESOLUTION = 32
PROMPTS = ("a red circle", "two blue squares", "a green triangle", "a yellow circle", "three red squares")


def make_pipeline(
    directory: Path,
    seed: int = 0,
    *,
    text_encoder_3: PreTrainedModel | None = None,
    tokenizer_3: PreTrainedTokenizerBase | None = None,
) -> Path:
    """Write the pipeline's directory in float32; returns it."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer()
    pipeline = StableDiffusion3Pipeline(
        transformer=_make_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_make_autoencoder(),
        text_encoder=_make_text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=_make_text_encoder(tokenizer),
        tokenizer_2=tokenizer,
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
    )
    pipeline.save_pretrained(directory)
    return Path(directory)


def _make_text_encoder(tokenizer: PreTrainedTokenizerBase) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            projection_dim=TEXT_WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _make_transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=RESOLUTION // 8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_projection_dim=32,
        joint_attention_dim=2 * TEXT_WIDTH,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=8,
        dual_attention_layers=(),
        qk_norm="rms_norm",
    )


def _make_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=2,
        sample_size=RESOLUTION,
        scaling_factor=1.5,
        shift_factor=0.06,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
