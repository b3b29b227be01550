"""How a reward network runs: each backend is a function of a network and golden inputs that returns what runs it.

``Eager`` is PyTorch as it is.  Letters: B images.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

Precision = Literal["float32", "bfloat16", "float16"]


class Network(Protocol):
    """What a backend needs of a reward network: see ``fastgrpo.rewards.network.RewardNetwork``."""

    @property
    def fingerprint(self) -> str: ...

    def copy_to(self, device: torch.device | str, dtype: torch.dtype) -> nn.Module: ...


def as_dtype(precision: str) -> torch.dtype:
    """The dtype of that name; ValueError for one that networks do not compute in."""
    if precision not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"precision must be float32, bfloat16 or float16, got {precision!r}")
    return getattr(torch, precision)


@dataclass(frozen=True, kw_only=True)
class Eager:
    """PyTorch's own kernels, one by one."""

    precision: Precision = "float32"

    def __post_init__(self) -> None:
        as_dtype(self.precision)

    @property
    def dtype(self) -> torch.dtype:
        return as_dtype(self.precision)

    def __call__(self, network: Network, golden: tuple[Tensor, ...]) -> Callable[..., Tensor]:
        return network.copy_to(golden[0].device, self.dtype)
