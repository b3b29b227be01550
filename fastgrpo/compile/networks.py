"""How a reward network runs: each backend is a function of a network and golden inputs that returns what runs it.

``Eager`` is PyTorch as it is, ``Inductor`` is torch.compile, ``Auto`` is one of them by the device; engines are in
``fastgrpo.tensorrt.backend``.  What was compiled runs only if it scores the golden inputs as eager float32 does:

    drift = max |compiled - eager| / (max eager - min eager)  <=  tolerance of the precision

Letters: B images.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

Precision = Literal["float32", "bfloat16", "float16"]

# at least five times what the networks of benchmarks/reward_engines.py drift, 1e-6, 2e-3 and 8e-3; a convolution of
# PyTorch's in float32 is TF32 on a GPU, and rounds to 5e-4
TOLERANCES = {"float32": 2e-3, "float16": 1e-2, "bfloat16": 8e-2}


class DriftError(ValueError):
    """Compiled code that does not score as eager does."""


class Network(Protocol):
    """What a backend needs of a reward network: see ``fastgrpo.rewards.networks.network_reward.RewardNetwork``."""

    @property
    def fingerprint(self) -> str: ...

    def copy_to(self, device: torch.device | str, dtype: torch.dtype) -> nn.Module: ...


def as_dtype(precision: str) -> torch.dtype:
    """The dtype of that name; ValueError for one that networks do not compute in."""
    if precision not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"precision must be float32, bfloat16 or float16, got {precision!r}")
    return getattr(torch, precision)


def check_tolerances(tolerances: Mapping[str, float], precision: str) -> None:
    """ValueError unless there is a positive tolerance for ``precision``."""
    if not tolerances.get(precision, 0) > 0:
        raise ValueError(
            f"reward_backend.tolerances.{precision} is {tolerances.get(precision)}; give the drift to accept, as a "
            f"positive share of the spread of the golden scores, for example {TOLERANCES[precision]:g}"
        )


@dataclass(frozen=True, kw_only=True)
class Eager:
    """PyTorch's own kernels, one by one."""

    precision: Precision = "float32"

    def __post_init__(self) -> None:
        as_dtype(self.precision)

    @property
    def dtype(self) -> torch.dtype:
        return as_dtype(self.precision)

    def dtype_on(self, device: torch.device) -> torch.dtype:
        return self.dtype

    def __call__(self, network: Network, golden: tuple[Tensor, ...]) -> Callable[..., Tensor]:
        return network.copy_to(golden[0].device, self.dtype)


@dataclass(frozen=True, kw_only=True)
class Inductor:
    """torch.compile, once for all batch sizes; ``mode`` is torch.compile's.

    Takes seconds to minutes at the first call, and a C++ compiler where images are on the CPU.
    """

    precision: Precision = "float16"
    mode: str = "default"
    tolerances: Mapping[str, float] = field(default_factory=lambda: dict(TOLERANCES))

    def __post_init__(self) -> None:
        as_dtype(self.precision)
        check_tolerances(self.tolerances, self.precision)
        # CUDA graphs would hold one graph a batch size, and overwrite scores that are still waited for
        if self.mode not in ("default", "max-autotune-no-cudagraphs"):
            raise ValueError(
                f"reward_backend.mode must be default or max-autotune-no-cudagraphs, got {self.mode!r}; "
                "the modes with CUDA graphs record one for every batch size"
            )

    @property
    def dtype(self) -> torch.dtype:
        return as_dtype(self.precision)

    def dtype_on(self, device: torch.device) -> torch.dtype:
        return self.dtype

    def __call__(self, network: Network, golden: tuple[Tensor, ...]) -> Callable[..., Tensor]:
        compiled = torch.compile(network.copy_to(golden[0].device, self.dtype), fullgraph=True, mode=self.mode)
        examples = tuple(part.clone() for part in cast_pixels(golden, self.dtype))
        for example in examples:
            torch._dynamo.mark_dynamic(example, 0)
        with torch.no_grad():
            compiled(*examples)
        run = _AnyBatch(compiled)
        check_drift(f"torch.compile's {self.precision} code", run, self.dtype, network, golden, self.tolerances)
        return run


@dataclass(frozen=True, kw_only=True)
class Auto(Inductor):
    """``Inductor`` with these fields where images are on a GPU, and ``Eager`` in float32 where they are on the CPU.

    A CPU has no fast float16, and compiling gains nothing there that would pay for a C++ compiler.
    """

    def dtype_on(self, device: torch.device) -> torch.dtype:
        return self.dtype if device.type == "cuda" else torch.float32

    def __call__(self, network: Network, golden: tuple[Tensor, ...]) -> Callable[..., Tensor]:
        if golden[0].device.type != "cuda":
            return Eager()(network, golden)
        _announce(self.precision)
        return super().__call__(network, golden)


@cache
def _announce(precision: str) -> None:
    """Once a process: what ``auto`` took."""
    print(f"fastgrpo: reward_backend=auto takes inductor in {precision}", file=sys.stderr)


@dataclass(frozen=True)
class _AnyBatch:
    """What was compiled for a batch of 2 and more, for any batch."""

    compiled: Callable[..., Tensor]

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Tensor:
        # a size of 1 would be compiled as a constant, on its own; the row twice costs less
        if len(inputs[0]) == 1:
            return self.compiled(*(part.repeat_interleave(2, dim=0) for part in inputs))[:1]
        return self.compiled(*(part.contiguous() for part in inputs))


def cast_pixels(inputs: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The inputs with their pixels, which come first, in ``dtype``; rows of texts stay as they are."""
    return (inputs[0].to(dtype), *inputs[1:])


@torch.no_grad()
def check_drift(
    what: str,
    run: Callable[..., Tensor],
    dtype: torch.dtype,
    network: Network,
    golden: tuple[Tensor, ...],
    tolerances: Mapping[str, float],
) -> float:
    """The drift of ``run`` from eager float32 on the golden inputs.

    DriftError, with both columns of scores, if it is above the tolerance, or if an answer has another shape or type
    than [B] float32 or is not finite; and if eager's own scores are all equal, so that nothing can be judged.
    """
    eager_B = network.copy_to(golden[0].device, torch.float32)(*golden).cpu()
    answer = run(*cast_pixels(golden, dtype))
    if answer.shape != eager_B.shape or answer.dtype != torch.float32:
        raise DriftError(
            f"{what} answered {answer.dtype} {list(answer.shape)} for {len(eager_B)} images, eager "
            f"float32 {list(eager_B.shape)}; use reward_backend=eager"
        )
    run_B = answer.cpu()
    spread = (eager_B.max() - eager_B.min()).item()
    # written so that nan is refused too
    if not spread > 0:
        raise DriftError(
            f"eager scores the {len(eager_B)} golden images between {eager_B.min():g} and {eager_B.max():g}, so {what} "
            "cannot be compared with it; check the reward's weights with fastgrpo doctor"
        )
    drift = (run_B - eager_B).abs().max().item() / spread
    precision = str(dtype).removeprefix("torch.")
    if not drift <= tolerances[precision]:
        columns = "\n".join(
            f"{row:>5} {eager:>12.6g} {ours:>12.6g}"
            for row, (eager, ours) in enumerate(zip(eager_B.tolist(), run_B.tolist(), strict=True))
        )
        better = "bfloat16 or float32" if precision == "float16" else "float32"
        remedy = "reward_backend=eager" if precision == "float32" else f"reward_backend.precision={better}"
        raise DriftError(
            f"{what} drifts by {drift:.2%} of the spread of eager's float32 scores, more than "
            f"{tolerances[precision]:.2%}:\nimage        eager     compiled\n{columns}\n"
            f"use {remedy}, or accept it with reward_backend.tolerances.{precision}"
        )
    return drift
