"""Reward networks in miniature with random weights, and inputs of 8 images for each: what backends are tried on."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BlipTextConfig, BlipVisionConfig, CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from fastgrpo.rewards.clip import ClipImageTower, ClipSimilarity
from fastgrpo.rewards.network import RewardNetwork

SIZE, TOKENS, WORDS, WIDTH = 32, 12, 50, 24


def images(num: int, seed: int = 1) -> Tensor:
    """Pixels [B, 3, H, W]: a colour, a gradient and noise, so that images differ as real ones do."""
    generator = torch.Generator().manual_seed(seed)
    colors_BCHW = torch.randn(num, 3, 1, 1, generator=generator)
    gradient_BCHW = torch.linspace(-1, 1, SIZE) * torch.randn(num, 3, SIZE, 1, generator=generator)
    return colors_BCHW + gradient_BCHW + 0.3 * torch.randn(num, 3, SIZE, SIZE, generator=generator)


def clip() -> RewardNetwork:
    """A CLIP image tower of two layers and the cosine with a text's embedding."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=8,
        projection_dim=WIDTH,
    )
    return ClipSimilarity(ClipImageTower(CLIPVisionModelWithProjection(config))).eval()


def clip_inputs(num: int = 8) -> tuple[Tensor, ...]:
    """Pixels and normalized text embeddings."""
    texts_BD = torch.randn(num, WIDTH, generator=torch.Generator().manual_seed(2))
    return images(num), F.normalize(texts_BD, dim=-1)


class CrossAttention(nn.Module):
    """A text of BLIP that looks at an image: (pixels, tokens [B, L], mask [B, L]) -> [B, D], the first token's."""

    def __init__(self) -> None:
        super().__init__()
        shared: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
        self.vision = BlipVisionModel(BlipVisionConfig(**shared, num_hidden_layers=2, image_size=SIZE, patch_size=8))
        text = BlipTextConfig(
            **shared,
            vocab_size=WORDS,
            num_hidden_layers=2,
            encoder_hidden_size=32,
            max_position_embeddings=TOKENS,
            is_decoder=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            sep_token_id=2,
        )
        self.text = BlipTextModel(text, add_pooling_layer=False)

    def forward(self, pixels_BCHW: Tensor, tokens_BL: Tensor, mask_BL: Tensor) -> Tensor:
        patches_BND = self.vision(pixels_BCHW).last_hidden_state
        text = self.text(tokens_BL, attention_mask=mask_BL, encoder_hidden_states=patches_BND)
        return text.last_hidden_state[:, 0]


class TextOnImage(RewardNetwork):
    """BLIP's text encoder on the image, and a linear head: the shape of ImageReward, with int64 inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = CrossAttention(), nn.Linear(32, 1)

    def forward(self, pixels_BCHW: Tensor, tokens_BL: Tensor, mask_BL: Tensor) -> Tensor:
        return self.head(self.trunk(pixels_BCHW, tokens_BL, mask_BL).float()).squeeze(-1)


def blip() -> RewardNetwork:
    torch.manual_seed(0)
    return TextOnImage().eval()


def blip_inputs(num: int = 8) -> tuple[Tensor, ...]:
    """Pixels, tokens and a mask of texts of 3 to L tokens."""
    generator = torch.Generator().manual_seed(3)
    tokens_BL = torch.randint(3, WORDS, (num, TOKENS), generator=generator)
    lengths_B = 3 + torch.arange(num) % (TOKENS - 2)
    mask_BL = (torch.arange(TOKENS) < lengths_B[:, None]).long()
    return images(num), tokens_BL * mask_BL, mask_BL


NETWORKS = {"clip": (clip, clip_inputs), "blip": (blip, blip_inputs)}
