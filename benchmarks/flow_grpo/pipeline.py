"""SD3.5-medium with random weights as a StableDiffusion3Pipeline directory, whole or in miniature: both sides load it.

                        full                          miniature
    transformer         24 blocks, width 1536         4 blocks, width 128
    dual attention      the first 13 blocks           the first 2
    image | text tokens 1024 | 205                    144 | 85
    LoRA rank           32                            4
    one forward         2.2 TFLOP                     0.38 GFLOP (0.18 s of one core for 9 samples with guidance)

Heads of 64, patches of 2, 16 latent channels, an autoencoder of four levels, two CLIP encoders and a T5 are in both.
Flow-GRPO pads CLIP's text to 77 tokens whatever the model, so the miniature has more text than its share.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel
from transformers.models.clip import CLIPTokenizer

from fastgrpo.shapes.pretrain.tokenizer import train_tokenizer

_CLIP_TOKENS = 77
_HEAD_DIM = 64


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large a pipeline is; ``clip`` and ``t5`` are (width, layers)."""

    resolution: int
    num_layers: int
    num_dual_layers: int
    num_heads: int
    vae_channels: tuple[int, ...]
    clip: tuple[tuple[int, int], tuple[int, int]]
    t5: tuple[int, int]
    t5_tokens: int
    lora_rank: int


FULL = Size(
    resolution=512,
    num_layers=24,
    num_dual_layers=13,
    num_heads=24,
    vae_channels=(128, 256, 512, 512),
    clip=((768, 12), (1280, 32)),
    t5=(4096, 24),
    t5_tokens=128,
    lora_rank=32,
)
# text encoders of one layer: 9 GB less to write and to load, and a smaller share of the iteration, on both sides
FULL_SHORT_TEXT = replace(FULL, clip=((768, 1), (1280, 1)), t5=(4096, 1))
MINIATURE = Size(
    resolution=192,
    num_layers=4,
    num_dual_layers=2,
    num_heads=2,
    vae_channels=(4, 8, 16, 16),
    clip=((64, 2), (64, 2)),
    t5=(192, 3),
    t5_tokens=8,
    lora_rank=4,
)


def make_pipeline(directory: Path, size: Size, device: str, seed: int = 0) -> Path:
    """Write the directory: transformer and autoencoder in float32, at full size the text encoders in float16."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer()
    tokenizer.model_max_length = _CLIP_TOKENS
    # at full size weights are drawn where that is fast
    with torch.device(device):
        encoders = [_clip(tokenizer, *shape) for shape in size.clip]
        pipeline = StableDiffusion3Pipeline(
            transformer=_transformer(size),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_autoencoder(size),
            text_encoder=encoders[0],
            tokenizer=tokenizer,
            text_encoder_2=encoders[1],
            tokenizer_2=tokenizer,
            text_encoder_3=_t5(tokenizer, *size.t5),
            tokenizer_3=tokenizer,
        )
    if size.t5[0] == FULL.t5[0]:
        for encoder in (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3):
            encoder.half()
    # one that is only half written is not taken for one
    unfinished = directory.with_name(f"{directory.name}.unfinished")
    pipeline.save_pretrained(unfinished)
    unfinished.rename(directory)
    if device == "cuda":
        # the sides are other processes, and need this memory
        del pipeline, encoders
        torch.cuda.empty_cache()
    return directory


def _transformer(size: Size) -> SD3Transformer2DModel:
    width = size.num_heads * _HEAD_DIM
    return SD3Transformer2DModel(
        sample_size=size.resolution // 8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        attention_head_dim=_HEAD_DIM,
        joint_attention_dim=size.t5[0],
        caption_projection_dim=width,
        pooled_projection_dim=sum(width for width, _ in size.clip),
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(size.num_dual_layers)),
        qk_norm="rms_norm",
    )


def _autoencoder(size: Size) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=size.vae_channels,
        layers_per_block=2,
        latent_channels=16,
        norm_num_groups=min(32, size.vae_channels[0]),
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
        # else diffusers scales it down on fp16
        force_upcast=True,
    )


def _clip(tokenizer: CLIPTokenizer, width: int, num_layers: int) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=width // _HEAD_DIM,
        max_position_embeddings=_CLIP_TOKENS,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


def _t5(tokenizer: CLIPTokenizer, width: int, num_layers: int) -> Any:
    # of T5 1.1 XXL: 64 heads of 64 in width 4096, feed-forward 10240
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=_HEAD_DIM,
        d_ff=5 * width // 2,
        num_layers=num_layers,
        num_heads=width // _HEAD_DIM,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
    )
    return T5EncoderModel(config)
