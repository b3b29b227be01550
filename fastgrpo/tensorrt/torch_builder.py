"""Engines by torch_tensorrt: its own converters take the exported graph straight to TensorRT, without ONNX.

The interface is that of torch_tensorrt 2.11 to 2.13, where networks are strongly typed unless one asks otherwise.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass

from fastgrpo.tensorrt.engine import Engine, load_library, require_gpu
from fastgrpo.tensorrt.export import Profile, inputs_of

_PACKAGES, _EXTRA = ("torch_tensorrt", "tensorrt"), "tensorrt"


@dataclass(frozen=True, kw_only=True)
class TorchTensorRTBuilder:
    """Engines for the GPU of this machine; the whole network is one engine, or building fails with the operator.

    ValueError at construction, before a model is loaded or an image is made, if a package or the GPU is missing.
    """

    def __post_init__(self) -> None:
        for name in _PACKAGES:
            load_library(name, _EXTRA)
        require_gpu()

    @property
    def versions(self) -> dict[str, str]:
        return {name: load_library(name, _EXTRA).__version__ for name in _PACKAGES}

    def build(self, program: ExportedProgram, profile: Profile, device: torch.device) -> bytes:
        torch_tensorrt = load_library("torch_tensorrt", _EXTRA)
        inputs = []
        for part in inputs_of(program):
            smallest, best, largest = profile.shapes(part.row)
            inputs.append(torch_tensorrt.Input(min_shape=smallest, opt_shape=best, max_shape=largest, dtype=part.dtype))
        with TemporaryDirectory(prefix="fastgrpo_") as directory, torch.cuda.device(device):
            return torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine(
                move_to_device_pass(program, str(device)),
                inputs=inputs,
                device=device,
                disable_tf32=True,
                # its default takes every attention mask for a causal one; ours say which text tokens are padding
                attn_bias_is_causal=False,
                # its default is one file in /tmp for all users of the machine
                timing_cache_path=str(Path(directory) / "timing.cache"),
            )

    def load(self, plan: bytes, names: Sequence[str], device: torch.device) -> Callable[..., Tensor]:
        return Engine(load_library("tensorrt", _EXTRA), plan, names, device)
