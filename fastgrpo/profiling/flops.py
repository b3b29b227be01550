"""FLOPs of matrix products, attention and convolutions as they are executed, and the rate that a device can reach.

A product of [M, K] and [K, N] is 2 M K N FLOPs; elementwise work counts nothing.  What checkpointing computes again
counts again.  Attention libraries that are not PyTorch's own are not counted.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from fastgrpo.profiling.timing import running_stage

_LARGE = {"cuda": 8192, "cpu": 1024}
_REPEATS = 5


def _cpu_attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _cpu_attention_backward(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)


_aten = torch.ops.aten
_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    # PyTorch's table is of GPUs
    _aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
}


class StageFlops(TorchDispatchMode):
    """``with StageFlops() as flops:`` counts by stage, of what runs eagerly on this thread and its backward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.by_stage: defaultdict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.by_stage[running_stage()] += formula(*args, **kwargs, out_val=result)
        return result


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second of the fastest of a few large matrix products, of random numbers, on this device."""
    size = _LARGE[device.type]
    first, second = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    fastest = float("inf")
    for _ in range(_REPEATS):
        _wait(device)
        start = time.perf_counter()
        first @ second
        _wait(device)
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
