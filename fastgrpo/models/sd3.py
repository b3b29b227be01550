"""Stable Diffusion 3 and 3.5, from any directory or hub id in diffusers' StableDiffusion3Pipeline layout.

The embedded model is such a directory too, so what trains on a laptop is the code that trains SD3.5.
Letters: B samples, L text tokens, C H W latent channels, height and width.
"""

from collections.abc import Callable, Sequence
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn

from fastgrpo.models.adaptation import Adaptation
from fastgrpo.models.lora import merge
from fastgrpo.types import Conditions
from fastgrpo_kernels import GuidedVelocity

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MIN_VOCABULARY = 32


class StableDiffusion3:
    """``FlowModel`` over a StableDiffusion3Pipeline.

    weights: a hub id, a directory, or ``pkg://package/path`` for one inside an installed package.
    adaptation: ``LoRA`` or ``FullFineTuning``.
    resolution: height and width of an image in pixels.
    guidance_scale: 1 turns classifier-free guidance off.
    max_sequence_length: tokens of the T5 encoder, or zeros in its place where the pipeline has none.
    dtype: float32, bfloat16 or float16, of the frozen weights; the autoencoder stays float32.
    """

    def __init__(
        self,
        *,
        weights: str,
        adaptation: Callable[[nn.Module], Adaptation],
        resolution: int,
        guidance_scale: float = 1.0,
        max_sequence_length: int = 128,
        dtype: str = "float32",
        use_t5: bool = True,
        device: str = "cpu",
    ) -> None:
        if dtype not in _DTYPES:
            raise ValueError(f"model.dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
        if guidance_scale < 1:
            raise ValueError(f"model.guidance_scale must be at least 1, got {guidance_scale}; 1 turns guidance off")
        self.guidance_scale = guidance_scale
        self.max_sequence_length = max_sequence_length
        self.device = torch.device(device)
        self.pipeline = _load_pipeline(weights, _DTYPES[dtype], use_t5).to(self.device)
        for module in (self.pipeline.vae, self.pipeline.text_encoder, self.pipeline.text_encoder_2, self.transformer):
            module.requires_grad_(False).eval()
        step = self.pipeline.vae_scale_factor * self.transformer.config.patch_size
        if resolution < step or resolution % step:
            raise ValueError(f"model.resolution must be a positive multiple of {step}, got {resolution}")
        side = resolution // self.pipeline.vae_scale_factor
        self.latent_shape = (int(self.transformer.config.in_channels), side, side)
        start = _fingerprint(self.transformer)
        self.adaptation = adaptation(self.transformer)
        self.fingerprint = f"{start} {self.adaptation.description}"
        self._encoded: dict[str, Conditions] = {}

    @property
    def transformer(self) -> Any:
        return self.pipeline.transformer

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        return self.adaptation.trainable

    @property
    def has_lora(self) -> bool:
        return bool(self.adaptation.lora_config)

    def encode(self, texts: Sequence[str]) -> Conditions:
        """Each distinct text goes through the encoders once in the life of the model."""
        for text in texts:
            if text not in self._encoded:
                self._encoded[text] = self._run_encoders(text)
        picked = [self._encoded[text] for text in texts]
        return Conditions(torch.cat([c.embeds_BLC for c in picked]), torch.cat([c.pooled_BC for c in picked]))

    @torch.no_grad()
    def _run_encoders(self, text: str) -> Conditions:
        """One text alone: a row is rounded as its batch wills, and a resumed run meets texts in other batches."""
        embeds_BLC, _, pooled_BC, _ = self.pipeline.encode_prompt(
            prompt=[text],
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return Conditions(embeds_BLC, pooled_BC)

    def velocity(self, x_BCHW: Tensor, t: float, conditions: Conditions) -> Tensor | GuidedVelocity:
        return self._guided(self.transformer, x_BCHW, t, conditions)

    @torch.no_grad()
    def reference_velocity(self, x_BCHW: Tensor, t: float, conditions: Conditions) -> Tensor | GuidedVelocity:
        with self.adaptation.reference() as transformer:
            return self._guided(transformer, x_BCHW, t, conditions)

    def _guided(
        self, transformer: nn.Module, x_BCHW: Tensor, t: float, conditions: Conditions
    ) -> Tensor | GuidedVelocity:
        v_BCHW = self._forward(transformer, x_BCHW, t, conditions)
        if self.guidance_scale == 1:
            return v_BCHW
        # two passes of one geometry in rollout and update alike: a joint batch would round differently from replay
        with torch.no_grad():
            v_empty_BCHW = self._forward(transformer, x_BCHW, t, self.encode([""]).repeat(len(x_BCHW)))
        return GuidedVelocity(v_BCHW, v_empty_BCHW, self.guidance_scale)

    def _forward(self, transformer: nn.Module, x_BCHW: Tensor, t: float, conditions: Conditions) -> Tensor:
        return transformer(
            hidden_states=x_BCHW.to(self.transformer.dtype),
            timestep=torch.full((len(x_BCHW),), 1000 * t, device=self.device),
            encoder_hidden_states=conditions.embeds_BLC,
            pooled_projections=conditions.pooled_BC,
            return_dict=False,
        )[0]

    @torch.no_grad()
    def decode(self, x_BCHW: Tensor) -> Tensor:
        vae = self.pipeline.vae
        images_BCHW = vae.decode(x_BCHW / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]
        return (images_BCHW / 2 + 0.5).clamp(0, 1)

    def save_lora(self, directory: Path) -> None:
        """Write the adapters as diffusers reads them, ``pipeline.load_lora_weights(directory)``; ValueError if none."""
        if not self.has_lora:
            raise ValueError("full fine-tuning has no LoRA to write; export the merged pipeline instead")
        directory.mkdir(parents=True, exist_ok=True)
        StableDiffusion3Pipeline.save_lora_weights(
            directory,
            transformer_lora_layers={name: weight.detach() for name, weight in self.trainable.items()},
            # without it a reader takes alpha = rank, which is another scale
            transformer_lora_adapter_metadata=self.adaptation.lora_config,
        )

    def save_merged(self, directory: Path) -> None:
        """Write a whole pipeline with the trained weights in it.  The model is spent: its adapters are gone."""
        merge(self.transformer)
        self.pipeline.save_pretrained(directory)


def _load_pipeline(weights: str, dtype: torch.dtype, use_t5: bool) -> StableDiffusion3Pipeline:
    path = weights
    if weights.startswith("pkg://"):
        package, _, inside = weights.removeprefix("pkg://").partition("/")
        path = str(files(package) / inside)
    without_t5 = {} if use_t5 else {"text_encoder_3": None, "tokenizer_3": None}
    try:
        pipeline = StableDiffusion3Pipeline.from_pretrained(
            path, dtype={"default": dtype, "vae": torch.float32}, **without_t5
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"model.weights: cannot load a StableDiffusion3Pipeline from {weights!r}: {error}") from error
    for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2, pipeline.tokenizer_3):
        # transformers answers with an empty tokenizer, not an error, where its files are missing
        if tokenizer is not None and len(tokenizer) < _MIN_VOCABULARY:
            raise ValueError(
                f"model.weights: a tokenizer of {weights!r} has {len(tokenizer)} words; its files are missing"
            )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _fingerprint(transformer: nn.Module) -> str:
    digest = sha256()
    for name, weight in transformer.state_dict().items():
        digest.update(f"{name} {tuple(weight.shape)} ".encode())
        # a strided sample of each tensor tells two models apart without a second pass over gigabytes
        flat = weight.detach().flatten()
        digest.update(flat[:: max(1, flat.numel() // 64)].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
