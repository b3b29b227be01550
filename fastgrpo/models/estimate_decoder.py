"""A small decoder, diffusers' AutoencoderTiny, for the images of a search's estimates: only rewards see these.

    images = decode(x / scaling_factor + shift_factor)      1 and 0 in published ones: they take the transformer's x

Letters: B samples, C H W latent channels, height and width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny
from safetensors import SafetensorError
from torch import Tensor

from fastgrpo.files.hub import HubId
from fastgrpo.files.locations import resolve_path
from fastgrpo.models.quiet import errors_alone
from fastgrpo.models.random_weights import random_module
from fastgrpo.models.weight_files import read_header, some
from fastgrpo.models.weights import read_config

_KEY = "model.estimate_decoder"
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_CLASS = AutoencoderTiny.__name__


@dataclass(frozen=True)
class EstimateDecoder:
    """Decodes as ``PipelineModel.decode`` does, by ``module``; ``run`` is what runs it, compiled or not."""

    module: Any
    run: Callable[[Any, Tensor], Tensor]

    @torch.no_grad()
    def __call__(self, x_BCHW: Tensor) -> Tensor:
        """Images, float32 [B, 3, height, width] in [0, 1], of latents as the transformer knows them."""
        config = self.module.config
        z_BCHW = (x_BCHW / config.scaling_factor + config.shift_factor).to(self.module.dtype)
        # on a CPU, in float32, twice as fast
        z_BCHW = z_BCHW.contiguous(memory_format=torch.channels_last)
        return (self.run(self.module, z_BCHW).float() / 2 + 0.5).clamp(0, 1).contiguous()


def decoded(module: Any, z_BCHW: Tensor) -> Tensor:
    """Images [B, 3, height, width] in [-1, 1]."""
    images_BCHW: Tensor = module.decode(z_BCHW, return_dict=False)[0]
    return images_BCHW


@dataclass(frozen=True)
class EstimateDecoderFiles:
    """Those of an AutoencoderTiny that goes with a model."""

    path: str
    directory: Path
    config: Mapping[str, Any]

    @classmethod
    def find(cls, path: str, *, num_channels: int, pixels: int) -> "EstimateDecoderFiles":
        """By the config's value: a directory, ``pkg://package/path``, or a hub id, which is downloaded.

        num_channels, pixels: of the model's latents, and of an image in a row of one latent pixel.  ValueError for what
        is none of these, cannot be downloaded, is damaged or decodes other latents.
        """
        directory = _directory(path)
        config = read_config(directory / "config.json", f"give the directory or id of an {_CLASS}", _KEY)
        if (found := config.get("_class_name")) != _CLASS:
            raise ValueError(f"{_KEY}={path} is of {found}, not of an {_CLASS}; give one, or null for the model's own")
        shape = int(config.get("latent_channels", 4)), _pixels(config)
        if shape != (num_channels, pixels):
            raise ValueError(
                f"{_KEY}={path} decodes latents of {shape[0]} channels and {shape[1]} pixels a row, and the model's "
                f"have {num_channels} and {pixels}; give one that was made for it, or null for the model's own decoder"
            )
        return cls(path, directory, config)

    def load(self, device: torch.device, dtype: torch.dtype, *, is_random: bool = False) -> Any:
        """The module; ``is_random`` draws weights of its sizes.  ValueError for weights that are not whole."""
        module = self._drawn(device, dtype) if is_random else self._read(device, dtype)
        module.requires_grad_(False).eval()
        # weight by weight: Module.to cannot replace FakeTensors, over which memory is counted
        for weight in module.parameters():
            if weight.ndim == 4:
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        return module

    def _drawn(self, device: torch.device, dtype: torch.dtype) -> Any:
        return random_module(lambda: AutoencoderTiny.from_config(self.config), device=device, dtype=dtype, seed=0)

    def _read(self, device: torch.device, dtype: torch.dtype) -> Any:
        weights = self.directory / _WEIGHTS
        if not weights.is_file():
            raise ValueError(f"{_KEY}: {weights} is missing; download it again")
        stored = read_header(weights, _KEY)
        try:
            # its own files hold a key that it then calls unexpected
            with errors_alone():
                module = AutoencoderTiny.from_pretrained(self.directory, torch_dtype=dtype, local_files_only=True)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{_KEY}: {self.directory} cannot be loaded ({reason}); download it again") from error
        # which diffusers fills with random numbers, without an error
        if missing := sorted(module.state_dict().keys() - stored.keys()):
            raise ValueError(f"{_KEY}: {weights} lacks {some(missing)}; give the weights of a whole {_CLASS}")
        return module.to(device)


def _directory(path: str) -> Path:
    try:
        directory = Path(resolve_path(path))
    except ValueError as error:
        raise ValueError(f"{_KEY}={error}") from error
    # Path("") would be the working directory
    if path and directory.is_dir():
        return directory
    if (found := HubId.parse(path)) is None:
        raise ValueError(
            f"{_KEY}={path!r} is neither a directory here ({directory.absolute()}) nor the id of a model on the hub; "
            "give a directory that exists, owner/name, or null for the model's own decoder"
        )
    try:
        return found.download(["config.json", _WEIGHTS])
    except (OSError, ValueError) as error:
        raise ValueError(found.why_not(error, _KEY)) from error


def _pixels(config: Mapping[str, Any]) -> int:
    num_upsampled = len(config.get("decoder_block_out_channels", (64,) * 4)) - 1
    return int(config.get("upsampling_scaling_factor", 2)) ** num_upsampled
