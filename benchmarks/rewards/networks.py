"""The reward networks in their official sizes, of random weights: their speed does not depend on what they know.

Letters: B images, U texts, D the width of an embedding, L tokens.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel, CLIPConfig

from fastgrpo.rewards import aesthetic, clip_score, hps, image_reward, pick_score
from fastgrpo.rewards.networks.blip import BlipTower
from fastgrpo.rewards.networks.clip import ClipSimilarity, random_image_tower
from fastgrpo.rewards.networks.network_reward import Backend, NetworkReward, RewardNetwork, TextEncoder, no_texts
from fastgrpo.rewards.networks.preprocess import CLIP_MEAN, CLIP_STD, PadToSquare, Preprocess
from fastgrpo.rewards.networks.score_head import ScoreHead

_SIZE, _MINIATURE_SIZE = 224, 32
_MINIATURE_WIDTH, _MINIATURE_VOCABULARY = 16, 40


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A reward's network, and what stands for its encoded texts; ``miniature`` is the same in a size for a test."""

    name: str
    full_size: Callable[[], RewardNetwork]
    miniature: Callable[[], RewardNetwork]
    # of full size and of the miniature
    encode: tuple[TextEncoder, TextEncoder]
    # hps resizes floats, all others bytes
    resizes_floats: bool = False

    def network(self, miniature: bool) -> RewardNetwork:
        torch.manual_seed(0)
        return (self.miniature() if miniature else self.full_size()).eval().requires_grad_(False)

    def size(self, miniature: bool) -> int:
        return _MINIATURE_SIZE if miniature else _SIZE

    def preprocess(self, miniature: bool) -> Preprocess | PadToSquare:
        size = self.size(miniature)
        if self.resizes_floats:
            return PadToSquare(size=size, mean=CLIP_MEAN, std=CLIP_STD)
        return Preprocess(short_side=size, crop_height=size, crop_width=size, mean=CLIP_MEAN, std=CLIP_STD)

    def reward(self, network: RewardNetwork, backend: Backend, miniature: bool) -> NetworkReward:
        return NetworkReward(
            network=network, preprocess=self.preprocess(miniature), backend=backend, encode=self.encode[miniature]
        )


@dataclass(frozen=True)
class RandomEmbeddings:
    """A unit vector [D] a text, always the same for the same text."""

    width: int

    def __call__(self, texts: list[str], device: torch.device) -> tuple[Tensor]:
        rows = [torch.randn(self.width, generator=_generator(text)) for text in texts]
        return (F.normalize(torch.stack(rows), dim=-1).to(device),)


@dataclass(frozen=True)
class RandomTokens:
    """Ids [U, 35] of random words, and a mask of no padding."""

    vocabulary: int

    def __call__(self, texts: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        ids_UL = torch.stack([torch.randint(self.vocabulary, (35,), generator=_generator(text)) for text in texts])
        return ids_UL.to(device), torch.ones_like(ids_UL).to(device)


def _generator(text: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(text.encode()))


def _clip_miniature() -> CLIPConfig:
    shared = {"hidden_size": _MINIATURE_WIDTH, "intermediate_size": 32, "num_hidden_layers": 2}
    vision = {**shared, "num_attention_heads": 2, "image_size": _MINIATURE_SIZE, "patch_size": 8}
    # projection_dim is also the vision model's own
    return CLIPConfig(vision_config={**vision, "projection_dim": _MINIATURE_WIDTH}, projection_dim=_MINIATURE_WIDTH)


def _similarity_miniature() -> ClipSimilarity:
    return ClipSimilarity(random_image_tower(_clip_miniature()))


def _aesthetic_miniature() -> aesthetic.AestheticNetwork:
    return aesthetic.AestheticNetwork(random_image_tower(_clip_miniature()), ScoreHead(_MINIATURE_WIDTH))


def _image_reward_miniature() -> image_reward.ImageRewardNetwork:
    shared = {
        "hidden_size": _MINIATURE_WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    vision = BlipVisionConfig(**shared, image_size=_MINIATURE_SIZE, patch_size=8)
    text = BlipTextConfig(**shared, encoder_hidden_size=_MINIATURE_WIDTH, vocab_size=_MINIATURE_VOCABULARY)
    tower = BlipTower(BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False))
    return image_reward.ImageRewardNetwork(tower, ScoreHead(_MINIATURE_WIDTH))


_EMBEDDINGS_L = (RandomEmbeddings(768), RandomEmbeddings(_MINIATURE_WIDTH))
_EMBEDDINGS_H = (RandomEmbeddings(1024), RandomEmbeddings(_MINIATURE_WIDTH))
ARCHITECTURES = {
    "clip_score": Architecture(
        name="CLIP-L", full_size=clip_score.full_size, miniature=_similarity_miniature, encode=_EMBEDDINGS_L
    ),
    "aesthetic": Architecture(
        name="CLIP-L, MLP", full_size=aesthetic.full_size, miniature=_aesthetic_miniature, encode=(no_texts, no_texts)
    ),
    "pick_score": Architecture(
        name="CLIP-H", full_size=pick_score.full_size, miniature=_similarity_miniature, encode=_EMBEDDINGS_H
    ),
    "hps": Architecture(
        name="CLIP-H",
        full_size=hps.full_size,
        miniature=_similarity_miniature,
        encode=_EMBEDDINGS_H,
        resizes_floats=True,
    ),
    "image_reward": Architecture(
        name="BLIP-L",
        full_size=image_reward.full_size,
        miniature=_image_reward_miniature,
        encode=(RandomTokens(30_522), RandomTokens(_MINIATURE_VOCABULARY)),
    ),
}
