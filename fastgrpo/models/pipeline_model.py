"""A diffusers pipeline as the model that rollout, update and evaluation know: what SD3 and FLUX have in common.

Here is what surrounds the transformer: loading, text encoders, the autoencoder, and writing.  Its velocities are in
policy.py.
Letters: B samples, L text tokens, C H W latent channels, height and width.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import track
from torch import Tensor, nn

from fastgrpo.models.adaptation import Adaptation
from fastgrpo.models.architectures import Architecture
from fastgrpo.models.attention import Attention, attention_backend
from fastgrpo.models.condition_cache import ConditionCache
from fastgrpo.models.encoder_identity import encoder_identity
from fastgrpo.models.fp8 import Fp8
from fastgrpo.models.image_sizes import ImageSizes
from fastgrpo.models.lossy import Lossy
from fastgrpo.models.modulation import Modulations
from fastgrpo.models.policy import Compile, Network, Policy, Uncompiled
from fastgrpo.models.text_encoders import TextEncoders
from fastgrpo.models.weights import load_pipeline, pipeline_directory, read_config, refuse_damaged_files
from fastgrpo.resolution import Resolution
from fastgrpo.types import Conditions

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    # to compare runs to more than rounding; slow
    "float64": torch.float64,
}
_HALF = (torch.bfloat16, torch.float16)
# of T5
_MAX_TOKENS = 512


class PipelineModel(Policy):
    """``FlowModel`` over a diffusers pipeline.

    weights: a directory, a hub id owner/name or owner/name@revision, ``pkg://package/path`` for a directory inside an
        installed package, or ``random`` for random weights and conditions in an ``architecture``.
    adaptation: ``LoRA`` or ``FullFineTuning``.
    resolution: of an image in pixels, [height, width] or both in one; that of prompts which ask for no other.
    guidance_scale: of classifier-free guidance, 1 turns it off.
    max_sequence_length: tokens of the T5 encoder.  use_t5: whether to load it.
    dtype, decode_dtype: float32, bfloat16, float16 or float64, of the frozen weights and of the autoencoder.
    attention: a name of ``fastgrpo.models.attention``.
    compile: of the repeated block and of decoding; None runs them as they are.
    checkpointing: keep the inputs of blocks alone for the backward pass, and compute the rest again.
    condition_cache: a directory for conditions, which later runs then need not encode; None keeps them in memory.
    lossy: how it may be fast and slightly wrong, on steps without log_prob; None is not at all.
    """

    pipeline_class: Any
    # names of its components: those that encode text, and of these T5 with its tokenizer
    text_encoders: tuple[str, ...]
    t5: tuple[str, ...]

    def __init__(
        self,
        *,
        weights: str,
        adaptation: Callable[[nn.Module], Adaptation],
        resolution: int | Sequence[int],
        architecture: Architecture | None = None,
        guidance_scale: float = 1.0,
        max_sequence_length: int = 128,
        use_t5: bool = True,
        dtype: str = "float32",
        decode_dtype: str = "float32",
        device: str = "cpu",
        attention: str = "sdpa",
        compile: Compile | None = None,
        checkpointing: bool = False,
        lossy: Lossy | None = None,
        condition_cache: str | None = None,
    ) -> None:
        _check_settings(dtype, decode_dtype, guidance_scale, max_sequence_length)
        self._resolution = Resolution.read(resolution, "model.resolution")
        compile = compile or Uncompiled()
        self.guidance_scale = guidance_scale
        self.max_sequence_length = max_sequence_length
        self.use_t5 = use_t5
        self.device = torch.device(device)
        self._decode = compile(_decode)
        is_compiled = self._decode is not _decode
        _check_lossy(lossy, self.device, is_compiled)
        backend = attention_backend(attention, device=self.device, dtype=_DTYPES[dtype])
        self._random = _architecture_of(weights, architecture)
        self._directory = None if self._random is not None else pipeline_directory(self.pipeline_class, weights)
        # all that can be refused is refused before gigabytes are read
        transformer, num_levels = self._describe()
        self._check(transformer)
        sizes = self._image_sizes(transformer, num_levels)
        sizes.check(self._resolution, f"model.resolution={self._resolution}")
        self.conditions = self._make_conditions(_DTYPES[dtype], _DTYPES[decode_dtype], condition_cache)
        self.pipeline: Any = self._make_pipeline(_DTYPES[dtype], _DTYPES[decode_dtype])
        for module in self.pipeline.components.values():
            if isinstance(module, nn.Module):
                module.requires_grad_(False).eval()
        # random weights are a function of these, and over FakeTensors there is nothing to read
        start = _fingerprint(self.transformer) if self._random is None else f"{self._random} {dtype} {self.device.type}"
        adapted = adaptation(self.transformer)
        self.fingerprint = f"{start} {adapted.description}"
        network = self._make_network(
            attention=backend,
            compile=compile,
            checkpointing=checkpointing,
            modulations=Modulations(is_frozen=adapted.is_frozen_outside_blocks),
        )
        if _DTYPES[decode_dtype] in _HALF:
            # weight by weight: Module.to cannot replace FakeTensors, over which memory is counted
            for weight in self.pipeline.vae.parameters():
                if weight.ndim == 4:
                    weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        super().__init__(
            adaptation=adapted,
            network=network,
            guidance_scale=guidance_scale,
            compile=compile,
            lossy=lossy,
        )

    @classmethod
    def image_sizes(cls, weights: str, architecture: Architecture | None = None) -> ImageSizes:
        """Which images such a model can draw; no weight is read for it."""
        random = _architecture_of(weights, architecture)
        directory = None if random is not None else pipeline_directory(cls.pipeline_class, weights)
        return cls._image_sizes(*_configs(random, directory))

    @classmethod
    def _image_sizes(cls, transformer: Mapping[str, Any], num_levels: int) -> ImageSizes:
        patch, most_tokens = cls._tokens_of(transformer)
        return ImageSizes.of(patch=patch, num_levels=num_levels, most_tokens=most_tokens)

    def _describe(self) -> tuple[Mapping[str, Any], int]:
        """The config of the transformer, and the number of the autoencoder's levels; ValueError for damaged files."""
        if self._directory is not None:
            encoders = [part for part in self.text_encoders if self.use_t5 or part not in self.t5]
            refuse_damaged_files(self._directory, ("transformer", "vae", *encoders))
        return _configs(self._random, self._directory)

    def _check(self, transformer: Mapping[str, Any]) -> None:
        """ValueError for settings that do not go with a transformer of this config."""

    def _make_pipeline(self, dtype: torch.dtype, decode_dtype: torch.dtype) -> Any:
        if self._random is not None:
            return self._random(device=self.device, dtype=dtype, decode_dtype=decode_dtype)
        return self._load(dtype, decode_dtype, without=self.text_encoders).to(self.device)

    def _load(self, dtype: torch.dtype, decode_dtype: torch.dtype, without: tuple[str, ...]) -> Any:
        assert self._directory is not None
        without += () if self.use_t5 else self.t5
        return load_pipeline(self.pipeline_class, self._directory, dtype, decode_dtype, **dict.fromkeys(without))

    def _make_conditions(
        self, dtype: torch.dtype, decode_dtype: torch.dtype, cache_directory: str | None
    ) -> ConditionCache:
        random, length = self._random, self.max_sequence_length
        if random is not None:
            return ConditionCache(
                encode=lambda texts: (
                    Conditions(*random.condition(text, length, self.device, dtype)) for text in texts
                ),
                encoders="random",
                directory=None,
                device=self.device,
            )

        def load() -> list[nn.Module]:
            loaded = self._load(dtype, decode_dtype, without=("transformer", "vae")).components
            encoders = {name: loaded[name] for name in self.text_encoders}
            self.pipeline.register_modules(**encoders)
            return [module for module in encoders.values() if module is not None]

        self._text_encoders = encoders = TextEncoders(
            load, self._run_encoders, self.device, is_often=cache_directory is None
        )
        settings = {"pipeline": self.pipeline_class.__name__, "dtype": str(dtype), "length": length, "t5": self.use_t5}
        assert self._directory is not None
        return ConditionCache(
            encode=encoders,
            encoders=encoder_identity(self._directory, settings),
            directory=None if cache_directory is None else Path(cache_directory).expanduser(),
            device=self.device,
        )

    @staticmethod
    @abstractmethod
    def _tokens_of(transformer: Mapping[str, Any]) -> tuple[int, int | None]:
        """By a transformer's config: latent pixels in a row of one token, and the most tokens in a row, if any."""

    @abstractmethod
    def _make_network(
        self, *, attention: Attention, compile: Compile, checkpointing: bool, modulations: Modulations
    ) -> Network: ...

    @abstractmethod
    def _run_encoders(self, text: str) -> tuple[Tensor, Tensor]:
        """Embeddings [1, L, C] and pooled embeddings [1, C] of a text."""

    @property
    def transformer(self) -> Any:
        return self.pipeline.transformer

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.latent_shape_of(None)

    def latent_shape_of(self, resolution: Resolution | None) -> tuple[int, int, int]:
        height, width = (side // self.pipeline.vae_scale_factor for side in resolution or self._resolution)
        return int(self.pipeline.vae.config.latent_channels), height, width

    def encode(self, texts: Sequence[str]) -> Conditions:
        """Each distinct text goes through the encoders once, in the life of the model or, with a directory, ever."""
        return self.conditions.get(texts)

    def encode_ahead(self, texts: Sequence[str], *, is_shown: bool = True) -> int:
        # without a directory rows would have to stay in memory, 1.7 MB a text of SD3.5
        absent = self.conditions.absent(texts)
        if absent:
            written = self.conditions.prepare(absent)
            for _ in track(written, "encoding prompts", total=len(absent), disable=not is_shown):
                pass
            # 11 GB of host memory for texts that nobody will ask for
            self._text_encoders.forget()
            self.pipeline.register_modules(**dict.fromkeys(self.text_encoders))
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return len(absent)

    @torch.no_grad()
    def decode(self, x_BCHW: Tensor) -> Tensor:
        vae = self.pipeline.vae
        z_BCHW = (x_BCHW / vae.config.scaling_factor + vae.config.shift_factor).to(vae.dtype)
        if vae.dtype in _HALF:
            z_BCHW = z_BCHW.contiguous(memory_format=torch.channels_last)
        return (self._decode(vae, z_BCHW).float() / 2 + 0.5).clamp(0, 1).contiguous()

    def save_lora(self, directory: Path) -> None:
        """Write the adapters as diffusers reads them, ``pipeline.load_lora_weights(directory)``; ValueError if none."""
        if not self.has_lora:
            raise ValueError("full fine-tuning has no LoRA to write; export the merged pipeline instead")
        directory.mkdir(parents=True, exist_ok=True)
        self.pipeline.save_lora_weights(
            directory,
            transformer_lora_layers={name: weight.detach() for name, weight in self.trainable.items()},
            # without it a reader takes alpha = rank, which is another scale
            transformer_lora_adapter_metadata=self.adaptation.lora_config,
        )

    def save_merged(self, directory: Path) -> None:
        """Write a whole pipeline with the trained weights in it.  The model is spent: its adapters are gone.

        All ranks must call it, since each may have a part of the weights; the first one writes.  ValueError for random
        weights, which have no text encoders.
        """
        if self._random is not None:
            raise ValueError("a pipeline of model.weights=random has no text encoders and cannot be exported")
        self.pipeline.register_modules(transformer=self.adaptation.merge_for_good())
        if _is_first():
            self._text_encoders.make()
            self.pipeline.save_pretrained(directory)


def _check_settings(dtype: str, decode_dtype: str, guidance_scale: float, max_sequence_length: int) -> None:
    for key, value in (("dtype", dtype), ("decode_dtype", decode_dtype)):
        if value not in _DTYPES:
            raise ValueError(f"model.{key} must be one of {', '.join(_DTYPES)}, got {value!r}")
    if not 1 <= guidance_scale < math.inf:
        raise ValueError(f"model.guidance_scale must be at least 1, got {guidance_scale}; 1 turns guidance off")
    if not 0 <= max_sequence_length <= _MAX_TOKENS:
        raise ValueError(
            f"model.max_sequence_length must lie in 0 to {_MAX_TOKENS}, the most that these models were trained with, "
            f"got {max_sequence_length}"
        )


def _check_lossy(lossy: Lossy | None, device: torch.device, is_compiled: bool) -> None:
    # four times the launches of bfloat16: finding a scale, dividing and rounding are kernels of their own in each layer
    if isinstance(lossy, Fp8) and device.type == "cuda" and not is_compiled:
        raise ValueError(
            "lossy=fp8 is slower than bfloat16 on a GPU unless the kernels that quantize are compiled into one; use "
            "compile=blocks, or lossy=none"
        )


def _architecture_of(weights: str, architecture: Architecture | None) -> Architecture | None:
    """The architecture to fill with random weights, or None where weights are loaded."""
    if weights != "random":
        return None
    if architecture is None:
        raise ValueError("model.weights=random needs model.architecture; take model=sd35_medium or model=flux_dev")
    return architecture


def _configs(random: Architecture | None, directory: Path | None) -> tuple[Mapping[str, Any], int]:
    """The config of the transformer, and the number of the autoencoder's levels."""
    if random is not None:
        return random.transformer_config, len(random.decoder_channels)
    assert directory is not None
    transformer, vae = (read_config(directory / part / "config.json") for part in ("transformer", "vae"))
    return transformer, len(vae.get("block_out_channels", [0]))


def _is_first() -> bool:
    """Whether this process is the one that writes, of those that have the same weights or parts of them."""
    return not dist.is_initialized() or dist.get_rank() == 0


def _decode(vae: Any, z_BCHW: Tensor) -> Tensor:
    return vae.decode(z_BCHW, return_dict=False)[0]


def _fingerprint(transformer: nn.Module) -> str:
    digest = sha256()
    for name, weight in transformer.state_dict().items():
        digest.update(f"{name} {tuple(weight.shape)} ".encode())
        # a strided sample of each tensor tells two models apart without a second pass over gigabytes
        flat = weight.detach().flatten()
        digest.update(flat[:: max(1, flat.numel() // 64)].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
