"""A FluxPipeline in miniature with random weights: 32x32 images, two double-stream and two single-stream blocks."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from fastgrpo.shapes.pretrain.tokenizer import train_tokenizer
from tests.tiny import PROMPTS

TEXT_WIDTH = 16
WORDS = sorted({word for text in PROMPTS for word in text.split()})


def make_pipeline(directory: Path, seed: int = 0, *, guidance_embeds: bool = True) -> Path:
    """Write the pipeline's directory in float32; returns it."""
    torch.manual_seed(seed)
    clip_tokenizer, t5_tokenizer = train_tokenizer(), make_t5_tokenizer()
    pipeline = FluxPipeline(
        transformer=make_transformer(guidance_embeds=guidance_embeds),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=make_autoencoder(),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(clip_tokenizer),
                hidden_size=TEXT_WIDTH,
                intermediate_size=2 * TEXT_WIDTH,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=clip_tokenizer.model_max_length,
                bos_token_id=clip_tokenizer.bos_token_id,
                eos_token_id=clip_tokenizer.eos_token_id,
                pad_token_id=clip_tokenizer.pad_token_id,
            )
        ),
        tokenizer=clip_tokenizer,
        text_encoder_2=T5EncoderModel(
            T5Config(vocab_size=len(t5_tokenizer), d_model=TEXT_WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        ),
        tokenizer_2=t5_tokenizer,
    )
    pipeline.save_pretrained(directory)
    return Path(directory)


def make_transformer(*, guidance_embeds: bool = True) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )


def make_t5_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of T5's kind that knows the words of the prompts."""
    words = ["<pad>", "</s>", "<unk>", *WORDS, *(f"<extra_{i}>" for i in range(40))]
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=model, **special)


def make_autoencoder(latent_channels: int = 16, shift_factor: float | None = 0.1159) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=2,
        scaling_factor=0.3611,
        shift_factor=shift_factor,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
