"""How a kernel becomes a PyTorch operator."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef, custom_op


def define_op(
    name: str,
    *,
    triton: Callable[..., Any],
    reference: Callable[..., Any],
    fake: Callable[..., Any] | None = None,
) -> CustomOpDef:
    """CUDA tensors run ``triton``; CPU tensors run ``reference``; tracing runs ``fake``, by default ``reference``."""
    op = custom_op(f"fastgrpo::{name}", _on_its_device(triton), mutates_args=(), device_types="cuda")
    op.register_kernel("cpu")(reference)
    op.register_fake(fake or reference)
    return op


def _on_its_device(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, which need not be the one that holds the tensors."""

    @wraps(launcher)
    def launch(*args: Any) -> Any:
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        with torch.cuda.device(device):
            return launcher(*args)

    return launch
