"""BLIP as ImageReward uses it: a text encoder whose layers attend to the image's tokens.  arXiv:2201.12086.

transformers' BlipVisionModel and BlipTextModel, with PyTorch's fused attention in place of theirs.
Letters: B images, N image tokens, L text tokens, H heads, E the width of a head, D that of the output.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

# of ViT-L and BERT-base; no shape tells them
_VISION_HEADS, _TEXT_HEADS = 16, 12
_MASKED = -10_000.0


class BlipTower(nn.Module):
    """(pixels [B, C, H, W], ids [B, L], mask [B, L]: 1 a token, 0 padding) -> the first text token's output [B, D]."""

    def __init__(self, vision: BlipVisionModel, text: BlipTextModel) -> None:
        super().__init__()
        self.vision, self.text = vision, text
        for layer in vision.encoder.layers:
            layer.self_attn = _ImageAttention(layer.self_attn)
        for layer in text.encoder.layer:
            layer.attention.self = _TextAttention(layer.attention.self)
            layer.crossattention.self = _TextAttention(layer.crossattention.self)

    def forward(self, pixels_BCHW: Tensor, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        image_BND = self.vision(pixels_BCHW).last_hidden_state
        text_BLD = self.text.embeddings(ids_BL)
        # added to the attention's logits, as BERT does; transformers' own masks do not export
        mask_B11L = ((1 - mask_BL) * _MASKED).to(text_BLD.dtype)[:, None, None, :]
        encoded = self.text.encoder(text_BLD, attention_mask=mask_B11L, encoder_hidden_states=image_BND)
        return encoded.last_hidden_state[:, 0]


class _ImageAttention(nn.Module):
    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.qkv, self.projection, self.num_heads = attention.qkv, attention.projection, attention.num_heads

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        q_BHNE, k_BHNE, v_BHNE = (_heads(part, self.num_heads) for part in self.qkv(hidden_states).chunk(3, dim=-1))
        attended_BHNE = F.scaled_dot_product_attention(q_BHNE, k_BHNE, v_BHNE)
        return self.projection(attended_BHNE.transpose(1, 2).flatten(2)), None


class _TextAttention(nn.Module):
    """Of the text to itself, or to the image if there are ``encoder_hidden_states``."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.query, self.key, self.value = attention.query, attention.key, attention.value
        self.num_heads = attention.num_attention_heads

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q_BHLE, k_BHNE, v_BHNE = (
            _heads(part, self.num_heads) for part in (self.query(hidden_states), self.key(source), self.value(source))
        )
        attended_BHLE = F.scaled_dot_product_attention(q_BHLE, k_BHNE, v_BHNE, attn_mask=attention_mask)
        return attended_BHLE.transpose(1, 2).flatten(2), None


def _heads(x_BND: Tensor, num_heads: int) -> Tensor:
    return x_BND.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def blip_large() -> tuple[BlipVisionConfig, BlipTextConfig]:
    """The sizes of ImageReward-v1.0: ViT-L/16 on images of 224 x 224, and BERT-base with two more tokens."""
    vision = BlipVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=_VISION_HEADS,
        image_size=224,
        layer_norm_eps=1e-6,
        initializer_range=0.02,
    )
    return vision, BlipTextConfig(encoder_hidden_size=1024, num_attention_heads=_TEXT_HEADS)


def blip_configs(vision: Mapping[str, Tensor], text: Mapping[str, Tensor]) -> tuple[BlipVisionConfig, BlipTextConfig]:
    """The sizes of weights in transformers' names; KeyError for what is not BLIP's."""
    width, _, patch, _ = vision["embeddings.patch_embedding.weight"].shape
    vocabulary, text_width = text["embeddings.word_embeddings.weight"].shape
    num_patches = vision["embeddings.position_embedding"].shape[1] - 1
    vision_config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(vision["encoder.layers.0.mlp.fc1.bias"]),
        num_hidden_layers=_num_layers(vision, "encoder.layers."),
        num_attention_heads=_VISION_HEADS,
        image_size=patch * round(num_patches**0.5),
        patch_size=patch,
        layer_norm_eps=1e-6,
    )
    text_config = BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=text_width,
        encoder_hidden_size=width,
        intermediate_size=len(text["encoder.layer.0.intermediate.dense.bias"]),
        num_hidden_layers=_num_layers(text, "encoder.layer."),
        num_attention_heads=_TEXT_HEADS,
        max_position_embeddings=len(text["embeddings.position_embeddings.weight"]),
        bos_token_id=vocabulary - 2,
        sep_token_id=None,
    )
    return vision_config, text_config


def _num_layers(weights: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).partition(".")[0] for name in weights if name.startswith(prefix)})
