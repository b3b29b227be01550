"""FLUX.1, from any directory or hub id in diffusers' FluxPipeline layout.

FLUX.1-dev was distilled with guidance: its scale is an input of the network, and there is no second branch.
FLUX.1-schnell knows no guidance.
"""

from collections.abc import Callable, Mapping
from typing import Any

from diffusers import FluxPipeline
from torch import Tensor

from fastgrpo.models.attention import Attention
from fastgrpo.models.flux_network import PATCH, FluxNetwork
from fastgrpo.models.modulation import Modulations
from fastgrpo.models.pipeline_model import PipelineModel
from fastgrpo.models.policy import Network


class Flux(PipelineModel):
    """``FlowModel`` over a FluxPipeline; latents are [B, 16, H, W] as in SD3 and packed inside the network."""

    pipeline_class = FluxPipeline
    text_encoders = ("text_encoder", "text_encoder_2")
    t5 = ("text_encoder_2", "tokenizer_2")

    @property
    def has_two_branches(self) -> bool:
        return False

    def _check(self, transformer: Mapping[str, Any]) -> None:
        if not self.use_t5 or self.max_sequence_length < 1:
            raise ValueError(
                "FLUX reads texts through T5: leave out model.use_t5, set model.max_sequence_length to 128"
            )
        if self.guidance_scale != 1 and not transformer.get("guidance_embeds", False):
            raise ValueError(
                f"model.guidance_scale is {self.guidance_scale}, but this transformer was distilled without guidance; "
                "use model.guidance_scale=1"
            )

    @staticmethod
    def _tokens_of(transformer: Mapping[str, Any]) -> tuple[int, int | None]:
        # positions are turned into angles as they come
        return PATCH, None

    def _make_network(
        self, *, attention: Attention, compile: Callable[[Any], Any], checkpointing: bool, modulations: Modulations
    ) -> Network:
        return FluxNetwork(
            guidance_scale=self.guidance_scale,
            attention=attention,
            compile=compile,
            checkpointing=checkpointing,
            modulations=modulations,
        )

    def _run_encoders(self, text: str) -> tuple[Tensor, Tensor]:
        embeds_BLC, pooled_BC, _ = self.pipeline.encode_prompt(
            prompt=[text], prompt_2=None, max_sequence_length=self.max_sequence_length
        )
        return embeds_BLC, pooled_BC
