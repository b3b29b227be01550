"""ImageReward-v1.0: a BLIP trained on human rankings of images of one prompt, about -2 to 2.  arXiv:2304.05977.

    score = (MLP(BLIP(image, text)) - 0.16717362830052426) / 1.0333394966054072

BLIP's answer is its text encoder's at the first of 35 tokens, [CLS], which attend to the image.  ``image_reward`` reads
the official ImageReward.pt, ``ImageRewardPackage`` is the authors' code.  Letters: B images, U texts, L tokens, C H W.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import BertTokenizer, BlipTextModel, BlipVisionModel

from fastgrpo.on_device import on_device
from fastgrpo.rewards.networks.blip import BlipTower, blip_configs, blip_large
from fastgrpo.rewards.networks.checkpoints import (
    checkpoint_directory,
    load_state,
    load_tensors,
    load_weights,
    read_for,
)
from fastgrpo.rewards.networks.network_reward import Backend, NetworkReward, RewardNetwork
from fastgrpo.rewards.networks.preprocess import CLIP_MEAN, CLIP_STD, Preprocess
from fastgrpo.rewards.networks.score_head import ScoreHead
from fastgrpo.rewards.networks.tokens import load_blip_tokenizer

_OPTION = "reward.terms.image_reward"
_NUM_TOKENS = 35
_MEAN, _STD = 0.16717362830052426, 1.0333394966054072
# part of the official file, and of no score
_UNUSED = ("blip.vision_proj.", "blip.text_proj.")
_PARTS = ("blip.visual_encoder.", "blip.text_encoder.", "mlp.")
_VISION_NAMES = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.": "embeddings.patch_embedding.",
    "blocks.": "encoder.layers.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    ".attn.qkv.": ".self_attn.qkv.",
    ".attn.proj.": ".self_attn.projection.",
}


def image_reward(*, path: str, file: str, tokenizer: str, backend: Backend) -> NetworkReward:
    """The weights in ``file`` at ``path``; BERT's vocab.txt is that at ``path`` if there is one, else at ``tokenizer``.

    Both are directories or hub ids.
    """
    directory = checkpoint_directory(path, [file], extra=["vocab.txt"], option=f"{_OPTION}.path")
    origin = f"{_OPTION}.path", path
    with read_for(*origin):
        network = _load_network(directory / file)
    if not (directory / "vocab.txt").is_file():
        origin = f"{_OPTION}.tokenizer", tokenizer
        directory = checkpoint_directory(tokenizer, ["vocab.txt"], option=origin[0])
    with read_for(*origin):
        words = load_blip_tokenizer(directory, network.trunk.text.config.vocab_size)
    size = network.trunk.vision.config.image_size
    return NetworkReward(
        network=network,
        preprocess=Preprocess(
            short_side=size, crop_height=size, crop_width=size, mean=CLIP_MEAN, std=CLIP_STD, crop_offset="nearest"
        ),
        backend=backend,
        encode=BlipTokens(words),
    )


class ImageRewardNetwork(RewardNetwork):
    """(pixels [B, C, H, W], ids [B, L] int64, mask [B, L] int64) -> scores [B]."""

    trunk: BlipTower

    def __init__(self, trunk: BlipTower, head: ScoreHead) -> None:
        super().__init__()
        self.trunk, self.head = trunk, head

    def forward(self, pixels_BCHW: Tensor, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        return (self.head(self.trunk(pixels_BCHW, ids_BL, mask_BL).float()) - _MEAN) / _STD


@dataclass(frozen=True)
class BlipTokens:
    """Texts -> ids [U, 35] and their mask [U, 35]; a longer text is cut."""

    tokenizer: BertTokenizer

    def __call__(self, texts: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        tokens = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=_NUM_TOKENS, return_tensors="pt"
        )
        return on_device(tokens.input_ids, device), on_device(tokens.attention_mask, device)


def full_size() -> ImageRewardNetwork:
    """The network in the official size, of random weights: ids are [B, 35] below 30,524."""
    vision, text = blip_large()
    trunk = BlipTower(BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False))
    return ImageRewardNetwork(trunk, ScoreHead(text.hidden_size))


@dataclass(frozen=True, kw_only=True)
class ImageRewardPackage:
    """The authors' package image-reward: scores [B] of images in [0, 1], one image at a time, by way of the CPU.

    ``name`` is ImageReward-v1.0, which it downloads, or the path of a checkpoint file.  ValueError where the package
    does not import: version 1.5 does not with transformers 5.
    """

    name: str = "ImageReward-v1.0"
    device: str = "cpu"

    def __post_init__(self) -> None:
        # frozen dataclasses still have a dict, and a run should fail before it starts
        _ = self.model

    @cached_property
    def model(self) -> Any:
        try:
            import ImageReward
        except ImportError as error:
            raise ValueError(
                f"the package image-reward does not import ({error}); pip install 'fastgrpo[image-reward]' beside a "
                "transformers below 5, or use reward=image_reward: it loads the same checkpoint without the package"
            ) from error
        with read_for(f"{_OPTION}.name", self.name):
            return ImageReward.load(self.name, device=self.device)

    @torch.no_grad()
    def __call__(self, images_BCHW: Tensor, prompts: list[str]) -> Tensor:
        pixels_BHWC = (images_BCHW * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        pairs = zip(prompts, pixels_BHWC, strict=True)
        return torch.tensor([self.model.score(prompt, Image.fromarray(pixels_HWC)) for prompt, pixels_HWC in pairs])


def _load_network(file: Path) -> ImageRewardNetwork:
    weights = {name: weight for name, weight in load_tensors(file).items() if not name.startswith(_UNUSED)}
    vision, text, head = (_part(weights, prefix) for prefix in _PARTS)
    vision = {_vision_name(name): weight for name, weight in vision.items()}
    if other := [name for name in weights if not name.startswith(_PARTS)]:
        raise ValueError(f"{file} has {', '.join(other[:5])}, which ImageReward lacks; give its ImageReward.pt")
    try:
        vision_config, text_config = blip_configs(vision, text)
    except KeyError as error:
        raise ValueError(f"{file} has no {error} of BLIP; give ImageReward.pt of zai-org/ImageReward") from error
    trunk = BlipTower(
        load_weights(BlipVisionModel, vision_config, vision, file),
        load_weights(BlipTextModel, text_config, text, file, add_pooling_layer=False),
    )
    score_head = ScoreHead(text_config.hidden_size)
    load_state(score_head, head, file)
    return ImageRewardNetwork(trunk, score_head)


def _part(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def _vision_name(name: str) -> str:
    if name.startswith("norm."):
        return f"post_layernorm.{name.removeprefix('norm.')}"
    for theirs, ours in _VISION_NAMES.items():
        name = name.replace(theirs, ours)
    return name
