"""Reward networks as TensorRT engines: the one place of their batches, precision, cache and verification.

    export -> key -> engine on disk, or built now -> loaded -> compared with eager float32 -> kept

How an engine is built is a piece of its own: ``tensorrt_torch`` (torch_tensorrt) or ``tensorrt_onnx`` (ONNX and
TensorRT's API).  Letters: B images.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.export import ExportedProgram

from fastgrpo.compile.networks import (
    TOLERANCES,
    DriftError,
    Network,
    Precision,
    as_dtype,
    cast_pixels,
    check_drift,
    check_tolerances,
)
from fastgrpo.tensorrt.cache import EngineCache, cache_key
from fastgrpo.tensorrt.export import Profile, export, graph_digest, inputs_of

_log = logging.getLogger(__name__)
_DRIVER = Path("/proc/driver/nvidia/version")


class EngineBuilder(Protocol):
    """One way from an exported network to an engine; its repr, with its fields, is part of the cache key."""

    @property
    def versions(self) -> Mapping[str, str]:
        """Of each package whose change makes another engine."""
        ...

    def build(self, program: ExportedProgram, profile: Profile, device: torch.device, /) -> bytes:
        """The engine of the network for ``device``; ValueError if it cannot be built."""
        ...

    def load(self, plan: bytes, names: Sequence[str], device: torch.device, /) -> Callable[..., Tensor]:
        """A function of inputs named ``names``; ValueError for an engine that does not load."""
        ...


@dataclass(frozen=True, kw_only=True)
class TensorRT:
    """An engine of the network for the GPU that its images are on.

    Built at the first call (seconds to minutes) and kept in ``directory``; every process compares it with eager float32
    before it uses it, and DriftError, with the figures, ends a run whose engine drifts by more than the tolerance.
    """

    builder: EngineBuilder
    directory: str
    precision: Precision = "float16"
    opt_batch: int = 64
    max_batch: int = 64
    tolerances: Mapping[str, float] = field(default_factory=lambda: dict(TOLERANCES))

    def __post_init__(self) -> None:
        as_dtype(self.precision)
        check_tolerances(self.tolerances, self.precision)
        _ = self.profile, self.cache

    @property
    def dtype(self) -> torch.dtype:
        return as_dtype(self.precision)

    def dtype_on(self, device: torch.device) -> torch.dtype:
        return self.dtype

    @property
    def profile(self) -> Profile:
        return Profile(opt_batch=self.opt_batch, max_batch=self.max_batch)

    @property
    def cache(self) -> EngineCache:
        return EngineCache(Path(self.directory).expanduser())

    def __call__(self, network: Network, golden: tuple[Tensor, ...]) -> Callable[..., Tensor]:
        device = golden[0].device
        examples = cast_pixels(golden, self.dtype)
        program = export(network.copy_to("cpu", self.dtype), examples, self.max_batch)
        facts = self.facts(network.fingerprint, program, device)
        key = cache_key(facts)
        with self.cache.locked(key):
            run = self._cached(key, network, program, golden)
            if run is None:
                start = time.perf_counter()
                # building may move the program to the device, so its inputs are read first
                names = [part.name for part in inputs_of(program)]
                plan = self.builder.build(program, self.profile, device)
                _log.info("built an engine of %d bytes in %.1f s", len(plan), time.perf_counter() - start)
                run = self._verified(plan, names, network, golden)
                self.cache.write(key, plan, facts)
        return run

    def facts(self, fingerprint: str, program: ExportedProgram, device: torch.device) -> dict[str, object]:
        """All that the engine depends on: a change of any of them makes another key."""
        return {
            "weights": fingerprint,
            "graph": graph_digest(program),
            "inputs": [[part.name, str(part.dtype), list(part.row)] for part in inputs_of(program)],
            "precision": self.precision,
            "profile": [self.opt_batch, self.max_batch],
            "builder": repr(self.builder),
            "device": device_facts(device),
            "versions": {"torch": torch.__version__, **self.builder.versions},
        }

    def _cached(
        self, key: str, network: Network, program: ExportedProgram, golden: tuple[Tensor, ...]
    ) -> Callable[..., Tensor] | None:
        """The engine on disk, verified; None if there is none that loads."""
        plan = self.cache.read(key)
        if plan is None:
            return None
        try:
            return self._verified(plan, [part.name for part in inputs_of(program)], network, golden)
        except DriftError:
            self.cache.remove(key)
            raise
        except ValueError as error:
            _log.warning("the engine %s does not load (%s); it is built again", key, error)
            return None

    def _verified(
        self, plan: bytes, names: Sequence[str], network: Network, golden: tuple[Tensor, ...]
    ) -> Callable[..., Tensor]:
        """The engine as a function, once it has scored the golden inputs as eager does; DriftError if it does not."""
        run = _AnyBatch(self.builder.load(plan, names, golden[0].device), self.max_batch)
        what = f"the TensorRT engine ({self.precision})"
        drift = check_drift(what, run, self.dtype, network, golden, self.tolerances)
        _log.info("%s drifts by %.3g of the spread of the golden scores", what, drift)
        return run


@dataclass(frozen=True)
class _AnyBatch:
    """An engine of at most ``max_batch`` images, for any number of them."""

    engine: Callable[..., Tensor]
    max_batch: int

    def __call__(self, *inputs: Tensor) -> Tensor:
        if len(inputs[0]) <= self.max_batch:
            return self.engine(*inputs)
        parts = zip(*(part.split(self.max_batch) for part in inputs), strict=True)
        return torch.cat([self.engine(*part) for part in parts])


def device_facts(device: torch.device) -> dict[str, object]:
    """What of a device, and of its driver, engines depend on."""
    if device.type != "cuda":
        return {"name": device.type}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "compute_capability": [properties.major, properties.minor],
        # the kernel module gives its exact version; torch only the CUDA version that it supports
        "driver": _DRIVER.read_text().splitlines()[0] if _DRIVER.exists() else torch._C._cuda_getDriverVersion(),  # type: ignore[attr-defined]
    }
