"""The scorer: CLIP in miniature, of the same scenes; it stands in for learned rewards.  Letters: B batch, L tokens."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer, CLIPVisionConfig

from fastgrpo.shapes.captions import training_captions
from fastgrpo.shapes.pretrain.recipe import Recipe
from fastgrpo.shapes.pretrain.tokenizer import TEXT_WIDTH, text_config, tokens
from fastgrpo.shapes.pretrain.training import train
from fastgrpo.shapes.world import IMAGE_SIZE, draw, sample_scene

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def train_scorer(recipe: Recipe, tokenizer: CLIPTokenizer) -> CLIPModel:
    """CLIP in miniature, contrastive over batches of distinct captions, all of them right."""
    torch.manual_seed(recipe.seed + 2)
    generator = np.random.default_rng(recipe.seed + 2)
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=8,
        projection_dim=TEXT_WIDTH,
    )
    model = CLIPModel(
        CLIPConfig(
            text_config=text_config(tokenizer).to_dict(), vision_config=vision.to_dict(), projection_dim=TEXT_WIDTH
        )
    )
    captions = training_captions()
    mean, std = (torch.tensor(x)[:, None, None] for x in (_CLIP_MEAN, _CLIP_STD))

    def loss(_: int) -> Tensor:
        batch = [captions[i] for i in generator.permutation(len(captions))[:64]]
        tokens_BL = tokens(tokenizer, [str(caption) for caption in batch])
        images_BCHW = draw([sample_scene(caption, generator) for caption in batch])
        logits_BB = model(input_ids=tokens_BL, pixel_values=(images_BCHW - mean) / std).logits_per_image
        target_B = torch.arange(64)
        return (F.cross_entropy(logits_BB, target_B) + F.cross_entropy(logits_BB.T, target_B)) / 2

    train("scorer", model.parameters(), loss, steps=recipe.scorer_steps, lr=1e-3)
    return model.eval()


def save_scorer(out: Path, tokenizer: CLIPTokenizer, model: CLIPModel) -> None:
    """Write a CLIP directory as transformers reads it, in half precision."""
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size=size, image_mean=_CLIP_MEAN, image_std=_CLIP_STD
    ).save_pretrained(out)
