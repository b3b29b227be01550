"""The embedded model for the code of others: a StableDiffusion3Pipeline, its conditions, prompts and reward.

Their ``encode_prompt`` pads CLIP's text to 77 tokens and wants a T5; this model has 12 tokens and none.  Conditions are
therefore those of the pipeline's own ``encode_prompt``, as ours are, each text encoded once.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from benchmarks.time_to_reward.learner import GROUP, PROMPTS
from fastgrpo.files.locations import resolve_path
from fastgrpo.prompts import PromptSource, load_prompts
from fastgrpo.rewards.shapes import ShapesReward

WEIGHTS = "pkg://fastgrpo.shapes/checkpoint"
PROMPT_FILE = "pkg://fastgrpo.shapes/prompts/train.txt"
RESOLUTION = 64


def load(device: torch.device) -> Any:
    """The pipeline in float32, frozen."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(resolve_path(WEIGHTS), text_encoder_3=None, tokenizer_3=None)
    pipeline.set_progress_bar_config(disable=True)
    for module in (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.vae, pipeline.transformer):
        module.requires_grad_(False)
        module.to(device, dtype=torch.float32)
    return pipeline


class Encoder:
    """(texts) -> embeddings [B, L, C] and pooled embeddings [B, C], each text encoded when it is first met."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._known: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        for text in texts:
            if text not in self._known:
                self._known[text] = self._encode(text)
        embeds, pooled = zip(*(self._known[text] for text in texts), strict=True)
        return torch.cat(embeds), torch.cat(pooled)

    @torch.no_grad()
    def _encode(self, text: str) -> tuple[Tensor, Tensor]:
        embeds_1LC, _, pooled_1C, _ = self._pipeline.encode_prompt(
            prompt=[text], prompt_2=None, prompt_3=None, do_classifier_free_guidance=False, max_sequence_length=0
        )
        return embeds_1LC, pooled_1C


class Groups:
    """Prompts of each iteration in our order, a text for each image, in micro-batches; and their reward."""

    def __init__(self, seed: int, micro_batch: int) -> None:
        self._source = PromptSource(load_prompts(resolve_path(PROMPT_FILE)), PROMPTS, seed)
        self._micro_batch = micro_batch
        self.reward = ShapesReward()

    def __call__(self, iteration: int) -> list[list[str]]:
        texts = [text for text in self._source.at(iteration).texts for _ in range(GROUP)]
        return [texts[first : first + self._micro_batch] for first in range(0, len(texts), self._micro_batch)]
