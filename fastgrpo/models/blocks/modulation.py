"""Modulations of a transformer's blocks: what time and pooled text add to, multiply and gate each token with.

They depend on (t, prompt) alone, not on the sample; where a text has no pooled embedding, on t alone.  Where the
weights that make them are frozen, and a batch is at one time, they are computed once a (t, prompt) and kept; otherwise
at each forward pass, with their gradient.
Letters: B samples, L tokens, C width of a token, E width of a modulation.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgrpo.types import Conditions, Time

_EPS = 1e-6

# (transformer, t, pooled_BC) -> modulations, [B, E] each, in the order in which the forward pass takes them
Modulate = Callable[[Any, Time, Tensor], Iterator[Tensor]]


class Modulations:
    """(transformer, t, conditions, modulate) -> the modulations.  Keeps ``max_bytes`` of rows if ``is_frozen``."""

    def __init__(self, *, is_frozen: bool, max_bytes: int = 1 << 30) -> None:
        self._is_frozen = is_frozen
        self._max_bytes = max_bytes
        # (t, key of a text) -> all modulations of one sample, end to end; the least recently used first
        self._rows: OrderedDict[tuple[float, int], Tensor] = OrderedDict()
        self._widths: list[int] = []

    def __call__(self, transformer: Any, t: Time, conditions: Conditions, modulate: Modulate) -> Iterator[Tensor]:
        # where a text has no pooled embedding they depend on the time alone
        keys = conditions.keys if conditions.pooled_BC.shape[1] else (0,) * len(conditions)
        if isinstance(t, Tensor) or not self._is_frozen or not keys:
            return modulate(transformer, t, conditions.pooled_BC)
        rows: dict[int, Tensor] = {}
        for place, key in enumerate(keys):
            if key not in rows:
                rows[key] = self._row(transformer, t, key, conditions.pooled_BC[place : place + 1], modulate)
        stacked_BE = torch.stack([rows[key] for key in keys])
        return iter(stacked_BE.split(self._widths, dim=1))

    @torch.no_grad()
    def _row(self, transformer: Any, t: float, key: int, pooled_1C: Tensor, modulate: Modulate) -> Tensor:
        """One sample alone, so that its rounding does not depend on what else is in its batch."""
        if (t, key) in self._rows:
            self._rows.move_to_end((t, key))
            return self._rows[t, key]
        parts = list(modulate(transformer, t, pooled_1C))
        self._widths = [part.shape[1] for part in parts]
        row_E = torch.cat(parts, dim=1)[0]
        self._rows[t, key] = row_E
        while len(self._rows) * row_E.nbytes > self._max_bytes and len(self._rows) > 1:
            self._rows.popitem(last=False)
        return row_E


def parts(modulation_BE: Tensor, count: int) -> tuple[Tensor, ...]:
    """The shifts, scales and gates [B, 1, C] that one modulation holds."""
    return modulation_BE[:, None].chunk(count, dim=2)


def normed(x_BLC: Tensor) -> Tensor:
    return F.layer_norm(x_BLC, x_BLC.shape[-1:], eps=_EPS)


def modulated(x_BLC: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x_BLC * (1 + scale) + shift
