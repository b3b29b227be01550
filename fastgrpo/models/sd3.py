"""Stable Diffusion 3 and 3.5, from any directory or hub id in diffusers' StableDiffusion3Pipeline layout.

The embedded model is such a directory too, so what trains on a laptop is the code that trains SD3.5.
"""

from collections.abc import Callable, Mapping
from typing import Any

from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from fastgrpo.models.attention import Attention
from fastgrpo.models.modulation import Modulations
from fastgrpo.models.pipeline_model import PipelineModel
from fastgrpo.models.policy import Network
from fastgrpo.models.sd3_network import SD3Network


class StableDiffusion3(PipelineModel):
    """``FlowModel`` over a StableDiffusion3Pipeline; without T5, zeros are in the place of its embeddings."""

    pipeline_class = StableDiffusion3Pipeline
    text_encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    t5 = ("text_encoder_3", "tokenizer_3")

    @staticmethod
    def _tokens_of(transformer: Mapping[str, Any]) -> tuple[int, int | None]:
        return int(transformer.get("patch_size", 2)), int(transformer.get("pos_embed_max_size", 96))

    def _make_network(
        self, *, attention: Attention, compile: Callable[[Any], Any], checkpointing: bool, modulations: Modulations
    ) -> Network:
        return SD3Network(attention=attention, compile=compile, checkpointing=checkpointing, modulations=modulations)

    def _run_encoders(self, text: str) -> tuple[Tensor, Tensor]:
        embeds_BLC, _, pooled_BC, _ = self.pipeline.encode_prompt(
            prompt=[text],
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return embeds_BLC, pooled_BC
