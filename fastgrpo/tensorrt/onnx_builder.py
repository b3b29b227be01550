"""Engines by way of ONNX and TensorRT's own builder; with TensorRT-RTX also on machines that have no GPU.

torch.export -> ONNX -> a strongly typed network, whose every operator computes in the dtype that the graph gives it ->
an engine.  The libraries ``tensorrt`` and ``tensorrt_rtx`` have the same interface here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor
from torch.export import ExportedProgram

from fastgrpo.tensorrt.engine import Engine, load_library, make_logger, require_gpu
from fastgrpo.tensorrt.export import Input, Profile, inputs_of, save_onnx

_EXTRAS = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}


@dataclass(frozen=True, kw_only=True)
class OnnxBuilder:
    """Engines of ``library`` for the GPU of this machine.

    ValueError at construction, before a model is loaded or an image is made, if a package or the GPU is missing.
    """

    library: Literal["tensorrt", "tensorrt_rtx"] = "tensorrt"

    def __post_init__(self) -> None:
        if self.library not in _EXTRAS:
            raise ValueError(f"reward_backend.builder.library must be tensorrt or tensorrt_rtx, got {self.library!r}")
        _ = self.versions
        require_gpu()

    @property
    def versions(self) -> dict[str, str]:
        packages = (self.library, "onnx", "onnxscript")
        return {name: load_library(name, _EXTRAS[self.library]).__version__ for name in packages}

    def build(self, program: ExportedProgram, profile: Profile, device: torch.device) -> bytes:
        with TemporaryDirectory(prefix="fastgrpo_") as directory, torch.cuda.device(device):
            path = Path(directory) / "network.onnx"
            save_onnx(program, path)
            return build_plan(load_library(self.library, _EXTRAS[self.library]), path, inputs_of(program), profile)

    def load(self, plan: bytes, names: Sequence[str], device: torch.device) -> Callable[..., Tensor]:
        return Engine(load_library(self.library, _EXTRAS[self.library]), plan, names, device)


def build_plan(
    library: Any, onnx: Path, inputs: Sequence[Input], profile: Profile, compute_capabilities: Sequence[str] = ()
) -> bytes:
    """The engine of the ONNX file for this GPU, or, by TensorRT-RTX, for GPUs such as ``("SM80", "SM89")``.

    ValueError with TensorRT's own words if it cannot parse or build it.
    """
    logger = make_logger(library)
    builder = library.Builder(logger)
    network, _parser = parse_onnx(library, builder, logger, onnx)
    config = builder.create_builder_config()
    # float32 means float32: networks that can stand less are built in another precision
    config.clear_flag(library.BuilderFlag.TF32)
    config.add_optimization_profile(_optimization_profile(builder, inputs, profile))
    if compute_capabilities:
        config.num_compute_capabilities = len(compute_capabilities)
        for i, name in enumerate(compute_capabilities):
            config.set_compute_capability(getattr(library.ComputeCapability, name), i)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ValueError(f"TensorRT cannot build the engine: {'; '.join(logger.errors) or 'it gave no reason'}")
    return bytes(plan)


def parse_onnx(library: Any, builder: Any, logger: Any, onnx: Path) -> tuple[Any, Any]:
    """The strongly typed network of the ONNX file, and the parser, which owns its weights."""
    network = builder.create_network(1 << int(library.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = library.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx)):
        errors = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise ValueError(f"TensorRT {library.__version__} cannot parse the network: {errors}")
    return network, parser


def _optimization_profile(builder: Any, inputs: Sequence[Input], profile: Profile) -> Any:
    optimization = builder.create_optimization_profile()
    for part in inputs:
        optimization.set_shape(part.name, *profile.shapes(part.row))
    return optimization
