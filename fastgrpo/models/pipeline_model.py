"""A diffusers pipeline as the model that rollout, update and evaluation know: what all families have in common.

Here is what surrounds the transformer: loading, text encoders, the autoencoder, and writing.  Its velocities are in
policy.py, and what a family writes in pipeline_family.py.
Letters: B samples, L text tokens, C H W latent channels, height and width.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import track
from torch import Tensor, nn

from fastgrpo.models.adaptation import Adaptation
from fastgrpo.models.added_lora import AddedLoRA
from fastgrpo.models.architectures import Architecture
from fastgrpo.models.attention import attention_backend
from fastgrpo.models.blocks.modulation import Modulations
from fastgrpo.models.condition_cache import ConditionCache
from fastgrpo.models.diffusers_call import DiffusersCall
from fastgrpo.models.encoder_identity import code_identity, encoder_identity
from fastgrpo.models.estimate_decoder import EstimateDecoder, EstimateDecoderFiles
from fastgrpo.models.estimate_decoder import decoded as decoded_small
from fastgrpo.models.fp8 import Fp8
from fastgrpo.models.lora import LoRA
from fastgrpo.models.lora_files import read_lora
from fastgrpo.models.lora_start import StartedLoRA
from fastgrpo.models.lora_writing import write_lora
from fastgrpo.models.lossy import Lossy
from fastgrpo.models.pipeline_family import PipelineFamily, architecture_of
from fastgrpo.models.pipeline_files import PipelineFiles
from fastgrpo.models.policy import Compile, Uncompiled
from fastgrpo.models.quiet import errors_alone
from fastgrpo.models.text_encoders import TextEncoders
from fastgrpo.models.text_lengths import filled
from fastgrpo.models.transformer_weights import shapes_of
from fastgrpo.models.weights import read_config
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


class PipelineModel(PipelineFamily):
    """``FlowModel`` over a diffusers pipeline.

    weights: a directory, a hub id owner/name or owner/name@revision, ``pkg://package/path`` for a directory inside an
        installed package, or ``random`` for random weights and conditions in an ``architecture``.
    variant: of which files the weights are read, as fp16; None reads the plain ones.
    transformer: a .safetensors file, a directory or a hub id whose transformer takes the place of the pipeline's; None
        keeps the pipeline's own.
    lora: a directory or a .safetensors file of a LoRA that is added to the frozen weights; None adds none.
    adaptation: ``LoRA`` or ``FullFineTuning``.
    resolution: of an image in pixels, [height, width] or both in one; that of prompts which ask for no other.
    guidance_scale: of classifier-free guidance, 1 turns it off.
    max_sequence_length: tokens of a text, of T5 where a family has CLIP too.  use_t5: whether to load it.
    dtype, decode_dtype: float32, bfloat16, float16 or float64, of the frozen weights and of the autoencoder.
    estimate_decoder: of a search's estimates, an AutoencoderTiny: a directory, a hub id or ``pkg://package/path``;
        ``auto`` is the one in a directory of this name beside the pipeline's parts, if there is one.  None decodes them
        as all other images.
    attention: a name of ``fastgrpo.models.attention``.
    compile: of the repeated block and of decoding; None runs them as they are.
    checkpointing: keep the inputs of blocks alone for the backward pass, and compute the rest again.
    condition_cache: a directory for conditions, which later runs then need not encode; None keeps them in memory.
    lossy: how it may be fast and slightly wrong, on steps without log_prob; None is not at all.
    """

    def __init__(
        self,
        *,
        weights: str,
        adaptation: Callable[[nn.Module], Adaptation],
        resolution: int | Sequence[int],
        architecture: Architecture | None = None,
        variant: str | None = None,
        transformer: str | None = None,
        lora: str | None = None,
        guidance_scale: float = 1.0,
        max_sequence_length: int = 128,
        use_t5: bool = True,
        dtype: str = "float32",
        decode_dtype: str = "float32",
        estimate_decoder: str | None = None,
        device: str = "cpu",
        attention: str = "sdpa",
        compile: Compile | None = None,
        checkpointing: bool = False,
        lossy: Lossy | None = None,
        condition_cache: str | None = None,
    ) -> None:
        self._check_settings(dtype, decode_dtype, guidance_scale, max_sequence_length, use_t5)
        self._resolution = Resolution.read(resolution, "model.resolution")
        compile = compile or Uncompiled()
        self._weights, self._dtype, self._decode_dtype = weights, dtype, decode_dtype
        self._is_changed = (transformer, lora) != (None, None)
        self.guidance_scale = guidance_scale
        self.max_sequence_length = max_sequence_length
        self.use_t5 = use_t5
        self.device = torch.device(device)
        decoded = self.decoded
        self._decode = compile(decoded)
        _check_lossy(lossy, self.device, is_compiled=self._decode is not decoded)
        if isinstance(adaptation, LoRA) and not hasattr(self.pipeline_class, "save_lora_weights"):
            raise ValueError(f"diffusers' {self.pipeline_class.__name__} has no LoRA files; use adaptation=full")
        attention = self.attention_of(attention)
        backend = attention_backend(attention, device=self.device, dtype=_DTYPES[dtype], has_lengths=self.has_lengths)
        self._random = architecture_of(weights, architecture)
        if self._random is not None and (variant, transformer) != (None, None):
            raise ValueError("model.weights=random reads no files; leave out model.variant and model.transformer")
        self._files = (
            PipelineFiles.find(self.pipeline_class, weights, variant, transformer) if self._random is None else None
        )
        # all that can be refused is refused before gigabytes are read
        transformer_config, vae_config = self._configs()
        self.check(transformer_config)
        sizes = self.image_sizes_of(transformer_config, vae_config)
        sizes.check(self._resolution, f"model.resolution={self._resolution}")
        self._num_channels, self._pixels = self.num_channels(vae_config), self.pixels_of_latent(vae_config)
        small = self._find_estimate_decoder(estimate_decoder)
        self.conditions = self._make_conditions(transformer_config, dtype, decode_dtype, condition_cache)
        added, adaptation = self._read_loras(lora, adaptation, transformer_config)
        self.pipeline: Any = self._make_pipeline(_DTYPES[dtype], _DTYPES[decode_dtype])
        if _DTYPES[decode_dtype] in _HALF:
            _to_channels_last(self.decoder)
        if added is not None:
            added.add_to(self.transformer)
        # random weights are a function of these, and over FakeTensors there is nothing to read
        is_read = self._random is None or added is not None
        start = _fingerprint(self.transformer) if is_read else f"{self._random} {dtype} {self.device.type}"
        adapted = adaptation(self.transformer)
        self.fingerprint = f"{start} {adapted.description}"
        network = self.make_network(
            attention=backend,
            compile=compile,
            checkpointing=checkpointing,
            modulations=Modulations(is_frozen=adapted.is_frozen_outside_blocks),
        )
        self._estimate_decoder = None
        if small is not None:
            module = small.load(self.device, _DTYPES[decode_dtype], is_random=self._random is not None)
            self._estimate_decoder = EstimateDecoder(module, compile(decoded_small))
        super().__init__(
            adaptation=adapted,
            network=network,
            guidance_scale=guidance_scale,
            compile=compile,
            lossy=lossy,
        )

    def _configs(self) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Of the transformer and of the autoencoder; ValueError for damaged files."""
        if self._random is not None:
            return self.random_configs(self._random)
        assert self._files is not None
        left_out = () if self.use_t5 else self.t5
        encoders = [part for part in self.text_encoders if part not in left_out]
        return self._files.describe(encoders, left_out)

    def _check_settings(
        self, dtype: str, decode_dtype: str, guidance_scale: float, max_sequence_length: int, use_t5: bool
    ) -> None:
        for key, value in (("dtype", dtype), ("decode_dtype", decode_dtype)):
            if value not in _DTYPES:
                raise ValueError(f"model.{key} must be one of {', '.join(_DTYPES)}, got {value!r}")
        if not 1 <= guidance_scale < math.inf:
            raise ValueError(f"model.guidance_scale must be at least 1, got {guidance_scale}; 1 turns guidance off")
        if not self.shortest_text <= max_sequence_length <= self.longest_text:
            raise ValueError(
                f"model.max_sequence_length must lie in {self.shortest_text} to {self.longest_text}, the most that "
                f"this model was trained with, got {max_sequence_length}"
            )
        if not use_t5 and not self.t5:
            raise ValueError(f"model.use_t5=false, but {type(self).__name__} has no T5; leave it out")

    def _find_estimate_decoder(self, path: str | None) -> EstimateDecoderFiles | None:
        if path == "auto":
            beside = None if self._files is None else self._files.directory / "estimate_decoder"
            path = str(beside) if beside is not None and beside.is_dir() else None
        if path is None:
            return None
        if not self.has_small_decoders:
            raise ValueError(
                f"model.estimate_decoder={path}: no AutoencoderTiny decodes the latents of {type(self).__name__}; set "
                "it to null"
            )
        return EstimateDecoderFiles.find(path, num_channels=self._num_channels, pixels=self._pixels)

    def _read_loras(
        self, lora: str | None, adaptation: Callable[[nn.Module], Adaptation], config: Mapping[str, Any]
    ) -> tuple[AddedLoRA | None, Callable[[nn.Module], Adaptation]]:
        """The one that is added to the frozen weights, and the adaptation with the one that it starts from."""
        if lora is None and not (isinstance(adaptation, LoRA) and adaptation.start is not None):
            return None, adaptation
        about = self.pipeline_class, self.transformer_class.__name__, shapes_of(self.transformer_class, config)
        return None if lora is None else read_lora(lora, *about), StartedLoRA.read(adaptation, *about)

    def _make_pipeline(self, dtype: torch.dtype, decode_dtype: torch.dtype) -> Any:
        """The pipeline on its device, frozen, without its text encoders."""
        if self._random is not None:
            make = partial(self._random.make, device=self.device)
            pipeline = self.pipeline_of(
                transformer=make("transformer", self.transformer_class, dtype=dtype),
                vae=make("autoencoder", self.autoencoder_class, dtype=decode_dtype),
            )
        else:
            pipeline = self._load(dtype, decode_dtype, without=self.text_encoders).to(self.device)
        for module in pipeline.components.values():
            if isinstance(module, nn.Module):
                module.requires_grad_(False).eval()
        return pipeline

    def _load(self, dtype: torch.dtype, decode_dtype: torch.dtype, without: tuple[str, ...]) -> Any:
        assert self._files is not None
        without += () if self.use_t5 else self.t5
        return self._files.load(dtype, decode_dtype, without)

    def _make_conditions(
        self, transformer_config: Mapping[str, Any], dtype: str, decode_dtype: str, cache_directory: str | None
    ) -> ConditionCache:
        random = self._random
        if random is not None:
            widths = self.text_widths(transformer_config)

            def draw(text: str) -> Conditions:
                num_tokens = self.num_text_tokens(text)
                row = Conditions(*random.condition(text, num_tokens, widths, self.device, _DTYPES[dtype]))
                return self._filled(row)

            return ConditionCache(
                encode=lambda texts: map(draw, texts), encoders="random", directory=None, device=self.device
            )

        def load() -> list[nn.Module]:
            loaded = self._load(_DTYPES[dtype], _DTYPES[decode_dtype], without=("transformer", "vae")).components
            encoders = {name: loaded[name] for name in self.text_encoders}
            self.pipeline.register_modules(**encoders)
            return [module for module in encoders.values() if module is not None]

        def run(text: str) -> Conditions:
            with errors_alone():
                return self._filled(self.run_encoders(text))

        self._text_encoders = encoders = TextEncoders(
            load,
            run,
            self.device,
            is_often=cache_directory is None,
        )
        settings = {
            "model": code_identity(type(self)),
            "pipeline": self.pipeline_class.__name__,
            "dtype": str(_DTYPES[dtype]),
            "length": self.max_sequence_length,
            "t5": self.use_t5,
        }
        assert self._files is not None
        if self._files.variant is not None:
            settings["variant"] = self._files.variant
        return ConditionCache(
            encode=encoders,
            encoders=encoder_identity(self._files.directory, settings),
            directory=None if cache_directory is None else Path(cache_directory).expanduser(),
            device=self.device,
        )

    def _filled(self, row: Conditions) -> Conditions:
        return filled(row, self.max_sequence_length) if self.has_lengths else row

    @property
    def transformer(self) -> Any:
        return self.pipeline.transformer

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.latent_shape_of(None)

    def latent_shape_of(self, resolution: Resolution | None) -> tuple[int, int, int]:
        height, width = (side // self._pixels for side in resolution or self._resolution)
        return self._num_channels, height, width

    def encode(self, texts: Sequence[str]) -> Conditions:
        """Each distinct text goes through the encoders once, in the life of the model or, with a directory, ever."""
        return self.conditions.get(texts)

    def check_texts(self, texts: Iterable[str]) -> None:
        # random conditions have no words
        if self._random is None:
            for text in texts:
                self.check_text(text)

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
        decoder = self.decoder
        z_BCHW = self.unscaled(x_BCHW).to(decoder.dtype)
        if decoder.dtype in _HALF:
            z_BCHW = z_BCHW.contiguous(memory_format=torch.channels_last)
        return (self._decode(decoder, z_BCHW).float() / 2 + 0.5).clamp(0, 1).contiguous()

    def decode_estimate(self, x_BCHW: Tensor) -> Tensor:
        return self.decode(x_BCHW) if self._estimate_decoder is None else self._estimate_decoder(x_BCHW)

    @property
    def diffusers_call(self) -> DiffusersCall | None:
        """How diffusers draws what this model draws; None for random weights, which have no text encoders."""
        if self._files is None:
            return None
        takes = inspect.signature(self.pipeline_class.__call__).parameters
        arguments = dict(zip(("height", "width"), self._resolution, strict=True)) | self.call_arguments()
        index = read_config(self._files.directory / "model_index.json")
        optional = getattr(self.pipeline_class, "_optional_components", ())
        absent = [name for name, part in index.items() if part == [None, None] and name not in optional]
        return DiffusersCall(
            pipeline=self.pipeline_class.__name__,
            weights=self._weights,
            variant=self._files.variant,
            absent=list(dict.fromkeys((*absent, *(() if self.use_t5 else self.t5)))),
            dtype=self._dtype,
            decode_dtype=self._decode_dtype,
            arguments={name: value for name, value in arguments.items() if name in takes},
            takes_times="sigmas" in takes,
            is_changed=self._is_changed,
            comfyui_knows=self.comfyui_knows,
        )

    def save_lora(self, directory: Path) -> None:
        """Write the adapters as diffusers, ComfyUI and peft read them (``lora_writing``); ValueError if none."""
        if not self.has_lora:
            raise ValueError("full fine-tuning has no LoRA to write; export the merged pipeline instead")
        write_lora(directory, self.pipeline, self.trainable, self.adaptation.lora_config, self._weights)

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


def _check_lossy(lossy: Lossy | None, device: torch.device, *, is_compiled: bool) -> None:
    # four times the launches of bfloat16: finding a scale, dividing and rounding are kernels of their own in each layer
    if isinstance(lossy, Fp8) and device.type == "cuda" and not is_compiled:
        raise ValueError(
            "lossy=fp8 is slower than bfloat16 on a GPU unless the kernels that quantize are compiled into one; use "
            "compile=blocks, or lossy=none"
        )


def _to_channels_last(decoder: nn.Module) -> None:
    # weight by weight: Module.to cannot replace FakeTensors, over which memory is counted
    for weight in decoder.parameters():
        if weight.ndim == 4:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)


def _is_first() -> bool:
    """Whether this process is the one that writes, of those that have the same weights or parts of them."""
    return not dist.is_initialized() or dist.get_rank() == 0


def _fingerprint(transformer: nn.Module) -> str:
    digest = sha256()
    for name, weight in transformer.state_dict().items():
        digest.update(f"{name} {tuple(weight.shape)} ".encode())
        # a strided sample of each tensor tells two models apart without a second pass over gigabytes
        flat = weight.detach().flatten()
        digest.update(flat[:: max(1, flat.numel() // 64)].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
