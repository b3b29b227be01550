"""What may be fast and slightly wrong in a model, for steps without log_prob: nothing, or its linear layers (fp8.py).

A piece is called once on the transformer, when its adapters are in place; what it returns is called whenever such steps
begin, after the adapters were merged, and gives the context in which the transformer is lossy.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import nn

# transformer -> () -> context
Lossy = Callable[[nn.Module], Callable[[], AbstractContextManager[None]]]


@dataclass(frozen=True, kw_only=True)
class Exact:
    """Steps without log_prob are computed as all others."""

    def __call__(self, transformer: nn.Module) -> Callable[[], AbstractContextManager[None]]:
        return nullcontext
