"""Reward networks in miniature with random weights, and inputs of 8 images for each: what backends are tried on."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from fastgrpo.rewards.aesthetic import AestheticNetwork
from fastgrpo.rewards.image_reward import ImageRewardNetwork
from fastgrpo.rewards.networks.blip import BlipTower
from fastgrpo.rewards.networks.clip import ClipImageTower, ClipSimilarity
from fastgrpo.rewards.networks.network_reward import RewardNetwork
from fastgrpo.rewards.networks.score_head import ScoreHead

# of images, of texts, of the vocabulary, of embeddings
SIZE, TOKENS, WORDS, WIDTH = 32, 12, 50, 24


def images(num: int, seed: int = 1) -> Tensor:
    """Pixels [B, 3, H, W]: a colour, a gradient and noise, so that images differ as real ones do."""
    generator = torch.Generator().manual_seed(seed)
    colors_BCHW = torch.randn(num, 3, 1, 1, generator=generator)
    gradient_BCHW = torch.linspace(-1, 1, SIZE) * torch.randn(num, 3, SIZE, 1, generator=generator)
    return colors_BCHW + gradient_BCHW + 0.3 * torch.randn(num, 3, SIZE, SIZE, generator=generator)


def tower() -> ClipImageTower:
    """A CLIP image tower of two layers."""
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=8,
        projection_dim=WIDTH,
    )
    return ClipImageTower(CLIPVisionModelWithProjection(config))


def clip() -> RewardNetwork:
    """A CLIP image tower and the cosine with a text's embedding."""
    torch.manual_seed(0)
    return ClipSimilarity(tower()).eval()


def clip_inputs(num: int = 8) -> tuple[Tensor, ...]:
    """Pixels and normalized text embeddings."""
    texts_BD = torch.randn(num, WIDTH, generator=torch.Generator().manual_seed(2))
    return images(num), F.normalize(texts_BD, dim=-1)


def blip() -> RewardNetwork:
    """ImageReward: a text that attends to the image, with int64 inputs."""
    torch.manual_seed(0)
    # transformers' own range of 0.02 makes all images of a small network alike
    shared: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    shared |= {"num_hidden_layers": 2, "initializer_range": 0.2}
    vision = BlipVisionConfig(**shared, image_size=SIZE, patch_size=8)
    text = BlipTextConfig(**shared, encoder_hidden_size=32, vocab_size=WORDS, bos_token_id=1, sep_token_id=2)
    tower = BlipTower(BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False))
    return ImageRewardNetwork(tower, ScoreHead(32)).eval()


def blip_inputs(num: int = 8) -> tuple[Tensor, ...]:
    """Pixels, tokens and a mask of texts of 3 to L tokens."""
    generator = torch.Generator().manual_seed(3)
    tokens_BL = torch.randint(3, WORDS, (num, TOKENS), generator=generator)
    lengths_B = 3 + torch.arange(num) % (TOKENS - 2)
    mask_BL = (torch.arange(TOKENS) < lengths_B[:, None]).long()
    return images(num), tokens_BL * mask_BL, mask_BL


def aesthetic() -> RewardNetwork:
    """A CLIP image tower and an MLP: images alone."""
    torch.manual_seed(0)
    return AestheticNetwork(tower(), ScoreHead(WIDTH)).eval()


def aesthetic_inputs(num: int = 8) -> tuple[Tensor, ...]:
    return (images(num),)


NETWORKS = {"clip": (clip, clip_inputs), "blip": (blip, blip_inputs), "aesthetic": (aesthetic, aesthetic_inputs)}
