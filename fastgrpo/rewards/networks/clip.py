"""CLIP as rewards use it: an image tower, which a backend compiles, and texts, which are encoded once.

arXiv:2103.00020.  Letters: B images, U texts, L tokens, D the width of an embedding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPTokenizer, CLIPVisionModelWithProjection

from fastgrpo.on_device import on_device
from fastgrpo.rewards.networks.network_reward import RewardNetwork


class ClipImageTower(nn.Module):
    """Pixels [B, C, H, W] -> CLIP's image embeddings [B, D], not normalized."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.vision_model, self.visual_projection = model.vision_model, model.visual_projection

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        return self.visual_projection(self.vision_model(pixels_BCHW).pooler_output)


class ClipSimilarity(RewardNetwork):
    """(pixels [B, C, H, W], normalized texts [B, D]) -> scale * cosine of the two embeddings, [B]."""

    scale: Tensor

    def __init__(self, trunk: nn.Module, scale: float = 1.0) -> None:
        super().__init__()
        self.trunk = trunk
        # a buffer is part of the fingerprint, by which compiled engines are told apart
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, pixels_BCHW: Tensor, texts_BD: Tensor) -> Tensor:
        images_BD = F.normalize(self.trunk(pixels_BCHW).float(), dim=-1)
        return self.scale * (images_BD * texts_BD).sum(dim=-1)


@dataclass(frozen=True, kw_only=True)
class ClipTexts:
    """Texts, each through ``clean`` -> normalized CLIP embeddings [U, D], in float32."""

    model: Any
    tokenizer: CLIPTokenizer
    clean: Callable[[str], str] = str

    @torch.no_grad()
    def __call__(self, texts: list[str], device: torch.device) -> tuple[Tensor]:
        length = self.model.config.text_config.max_position_embeddings
        cleaned = [self.clean(text) for text in texts]
        tokens = self.tokenizer(cleaned, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        encoder, projection = self.model.text_model.to(device), self.model.text_projection.to(device)
        # no mask: attention is causal, and the embedding is that of the first end-of-text, which sees no padding
        pooled_UD = encoder(on_device(tokens.input_ids, device)).pooler_output
        return (F.normalize(projection(pooled_UD), dim=-1),)


def vit_l_14() -> CLIPConfig:
    """openai/clip-vit-large-patch14: images of 224 x 224, D 768."""
    return CLIPConfig(
        text_config={"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768},
        vision_config={
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "patch_size": 14,
            "projection_dim": 768,
        },
        projection_dim=768,
    )


def vit_h_14() -> CLIPConfig:
    """laion/CLIP-ViT-H-14-laion2B-s32B-b79K, of PickScore and HPSv2: images of 224 x 224, D 1024."""
    return CLIPConfig(
        text_config={
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "projection_dim": 1024,
            "hidden_act": "gelu",
        },
        vision_config={
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "patch_size": 14,
            "projection_dim": 1024,
            "hidden_act": "gelu",
        },
        projection_dim=1024,
    )


def random_image_tower(config: CLIPConfig) -> ClipImageTower:
    """The tower alone, of random weights: what a benchmark needs, without a download."""
    return ClipImageTower(CLIPVisionModelWithProjection(config.vision_config))
