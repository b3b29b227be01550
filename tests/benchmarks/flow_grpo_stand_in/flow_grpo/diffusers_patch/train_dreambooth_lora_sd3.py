"""Conditions of SD3: two CLIPs side by side, widened with zeros, and a T5 after them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_CLIP_TOKENS = 77


def encode_prompt(
    text_encoders: Sequence[Any], tokenizers: Sequence[Any], prompt: Sequence[str], max_sequence_length: int
) -> tuple[Tensor, Tensor]:
    """Embeddings of the tokens, and the pooled ones."""

    def tokens(tokenizer: Any, length: int) -> Tensor:
        settings: dict[str, Any] = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        ids: Tensor = tokenizer(list(prompt), max_length=length, **settings).input_ids
        return ids

    *clips, t5 = text_encoders
    seen = [
        encoder(tokens(tokenizer, _CLIP_TOKENS), output_hidden_states=True)
        for encoder, tokenizer in zip(clips, tokenizers, strict=False)
    ]
    t5_embeds = t5(tokens(tokenizers[-1], max_sequence_length))[0]
    clip_embeds = torch.cat([one.hidden_states[-2] for one in seen], dim=-1)
    missing = t5_embeds.shape[-1] - clip_embeds.shape[-1]
    embeds = torch.cat([torch.nn.functional.pad(clip_embeds, (0, missing)), t5_embeds], dim=1)
    return embeds, torch.cat([one[0] for one in seen], dim=-1)
