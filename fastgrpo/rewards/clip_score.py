"""CLIP score: the cosine between an image's and its prompt's CLIP embeddings, in [-1, 1].  arXiv:2104.08718.

Letters: B images, U texts, D the width of an embedding, L tokens.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer

from fastgrpo import shapes
from fastgrpo.rewards.network import Backend, NetworkReward, RewardNetwork
from fastgrpo.rewards.preprocess import Preprocess


def clip_score(*, path: str, backend: Backend) -> NetworkReward:
    """The CLIP in the directory ``path``, as transformers saves it, or ``shapes``: the scorer of the embedded model."""
    embedded = Path(shapes.__file__).parent / "checkpoint" / "scorer"
    directory = embedded if path == "shapes" else Path(path).expanduser()
    config = directory / "preprocessor_config.json"
    if not config.exists():
        raise ValueError(
            f"{config} does not exist; give reward.terms.clip_score.path the directory of a CLIP with its "
            "tokenizer and preprocessor_config.json, for example a download of openai/clip-vit-large-patch14"
        )
    model: Any = CLIPModel.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    return NetworkReward(
        network=ClipSimilarity(ClipImageTower(model)),
        preprocess=Preprocess.from_config(json.loads(config.read_text()), str(config)),
        backend=backend,
        encode=ClipTexts(model=model, tokenizer=load_clip_tokenizer(directory, model.config.text_config.vocab_size)),
    )


class ClipImageTower(nn.Module):
    """Pixels [B, C, H, W] -> CLIP's image embeddings [B, D], not normalized."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.vision_model, self.visual_projection = model.vision_model, model.visual_projection

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        return self.visual_projection(self.vision_model(pixels_BCHW).pooler_output)


class ClipSimilarity(RewardNetwork):
    """scale * cosine of the image's embedding and the text's, [B]."""

    def __init__(self, trunk: nn.Module, scale: float = 1.0) -> None:
        super().__init__()
        self.trunk, self.scale = trunk, scale

    def forward(self, pixels_BCHW: Tensor, texts_BD: Tensor) -> Tensor:
        images_BD = F.normalize(self.trunk(pixels_BCHW).float(), dim=-1)
        return self.scale * (images_BD * texts_BD).sum(dim=-1)


@dataclass(frozen=True, kw_only=True)
class ClipTexts:
    """Texts -> normalized CLIP embeddings [U, D], in float32."""

    model: Any
    tokenizer: CLIPTokenizer

    @torch.no_grad()
    def __call__(self, texts: list[str], device: torch.device) -> tuple[Tensor]:
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        encoder, projection = self.model.text_model.to(device), self.model.text_projection.to(device)
        pooled_UD = encoder(tokens.input_ids.to(device), attention_mask=tokens.attention_mask.to(device)).pooler_output
        return (F.normalize(projection(pooled_UD), dim=-1),)


def load_clip_tokenizer(directory: Path, vocabulary: int) -> CLIPTokenizer:
    """The tokenizer in ``directory``; ValueError if it lacks tokens of the model's vocabulary."""
    tokenizer = CLIPTokenizer.from_pretrained(directory, local_files_only=True)
    # transformers answers with a tokenizer of a few special tokens, and no error, when the files are missing
    if len(tokenizer) != vocabulary:
        raise ValueError(
            f"the tokenizer in {directory} has {len(tokenizer)} tokens, its model {vocabulary}; "
            "put the model's tokenizer.json, or vocab.json and merges.txt, there"
        )
    return tokenizer
