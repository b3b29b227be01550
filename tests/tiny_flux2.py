"""A Flux2KleinPipeline in miniature with random weights: 64x64 images, two double- and two single-stream blocks."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from tokenizers import pre_tokenizers
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

from fastgrpo.config import load_config
from fastgrpo.models.flux2 import Flux2Klein
from fastgrpo.models.lora import LoRA

TEXT_WIDTH = 8
# the template of Qwen3 for one question, to be answered without thinking
TEMPLATE = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""
# tokens of a text are its bytes, and so many around it
NUM_TEMPLATE_TOKENS = len("<user\n>\n<assistant\n<think>\n\n</think>\n\n")
# more than any of the prompts
LENGTH = NUM_TEMPLATE_TOKENS + 18
GUIDANCE = 4.0
TARGETS = tuple(load_config("train", ["adaptation=lora_flux2"]).adaptation.targets)


def make_pipeline(directory: Path, seed: int = 0, *, is_distilled: bool = False) -> Path:
    """Write the pipeline's directory in float32; returns it."""
    torch.manual_seed(seed)
    tokenizer = _make_tokenizer()
    pipeline = Flux2KleinPipeline(
        transformer=make_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_make_autoencoder(),
        text_encoder=_make_text_encoder(tokenizer),
        tokenizer=tokenizer,
        is_distilled=is_distilled,
    )
    pipeline.save_pretrained(directory)
    return Path(directory)


def make_transformer() -> Flux2Transformer2DModel:
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * TEXT_WIDTH,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    unlike_scales(transformer)
    return transformer


@torch.no_grad()
def unlike_scales(transformer: Flux2Transformer2DModel) -> None:
    """Those of norms as if they had been trained: each another, so that none can stand for another."""
    generator = torch.Generator().manual_seed(5)
    for weight in transformer.parameters():
        if weight.ndim == 1:
            weight.copy_(0.5 + torch.rand(weight.shape, generator=generator))


def _make_tokenizer() -> Qwen2TokenizerFast:
    vocabulary = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    special = ["<|im_start|>", "<|im_end|>"]
    return Qwen2TokenizerFast(vocabulary, [], additional_special_tokens=special, chat_template=TEMPLATE)


def _make_text_encoder(tokenizer: Qwen2TokenizerFast) -> Qwen3ForCausalLM:
    """It needs its layers: of 9, 18 and 27 embeddings are made."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=28,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=4,
            initializer_range=0.5,
            tie_word_embeddings=True,
        )
    )


def _make_autoencoder() -> AutoencoderKLFlux2:
    autoencoder = AutoencoderKLFlux2(
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        mid_block_add_attention=False,
    )
    # as if it had been trained
    autoencoder.bn.running_mean.normal_()
    autoencoder.bn.running_var.uniform_(0.3, 3)
    return autoencoder


def make_model(weights: Path, **settings: Any) -> Flux2Klein:
    defaults: dict[str, Any] = {
        "weights": str(weights),
        "adaptation": LoRA(rank=2, alpha=4.0, targets=TARGETS),
        "resolution": 64,
        "guidance_scale": GUIDANCE,
        "max_sequence_length": LENGTH,
    }
    return Flux2Klein(**defaults | settings)


@torch.no_grad()
def nudge(trainable: dict[str, torch.nn.Parameter]) -> None:
    """Adapters that matter: they start at zero."""
    generator = torch.Generator().manual_seed(2)
    for weight in trainable.values():
        weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
