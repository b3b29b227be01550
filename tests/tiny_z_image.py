"""A ZImagePipeline in miniature with random weights; its texts are read by a Qwen3 through a chat template.

Its tokenizer is Qwen's with a token a byte, so texts are long: ``PROMPTS`` fill up to unlike multiples of 32 tokens.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from tokenizers import pre_tokenizers
from torch import nn
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from tests.tiny_flux import make_autoencoder

TEXT_WIDTH = 24
SHIFT = 3.0
# 5, 32 and 44 tokens with the template: filled up to 32, 32 and 64
PROMPTS = ("a", "a red circle near a triangle", "two blue squares and a yellow line above")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
# Qwen3's, without what it has for tools and for earlier messages
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role[0] }}{{ message.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)


def make_pipeline(directory: Path, seed: int = 0) -> Path:
    """Write the pipeline's directory in float32; returns it."""
    torch.manual_seed(seed)
    tokenizer = _make_tokenizer()
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=make_autoencoder(),
        text_encoder=Qwen3Model(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=TEXT_WIDTH,
                intermediate_size=2 * TEXT_WIDTH,
                num_hidden_layers=3,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
            )
        ),
        tokenizer=tokenizer,
        transformer=make_transformer(),
    )
    pipeline.save_pretrained(directory)
    return Path(directory)


def make_transformer(**sizes: Any) -> ZImageTransformer2DModel:
    defaults: dict[str, Any] = {
        "dim": 48,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": TEXT_WIDTH,
        "axes_dims": [8, 6, 10],
        "axes_lens": [128, 32, 32],
    }
    transformer = ZImageTransformer2DModel(**defaults | sizes)
    # norms and the tokens that fill up are trained too: neither ones nor zeros
    with torch.no_grad():
        for name, weight in transformer.named_parameters():
            if name.endswith("pad_token") or "norm" in name:
                nn.init.normal_(weight, mean=float("norm" in name), std=0.3)
    return transformer


def _make_tokenizer() -> Qwen2Tokenizer:
    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Qwen2Tokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL[1:])})
    tokenizer.chat_template = TEMPLATE
    return tokenizer
