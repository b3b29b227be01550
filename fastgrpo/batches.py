"""Micro-batches of one size: the last is filled up with rows of the first, whose results are thrown away.

So there is one shape to compile, and a sample is rounded alike wherever it is in whichever batch of a kind.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from fastgrpo.runtime.batch_size import BatchSize
from fastgrpo.types import Conditions

Result = TypeVar("Result")


@dataclass(frozen=True)
class Batch:
    """``count`` rows from ``first``, filled up to ``size``."""

    first: int
    count: int
    size: int

    def of(self, x_BX: Tensor, dim: int = 0) -> Tensor:
        """The batch's rows of a tensor, ``size`` of them."""
        rows = x_BX.narrow(dim, self.first, self.count)
        missing = self.size - self.count
        return torch.cat([rows, x_BX.narrow(dim, 0, missing)], dim=dim) if missing else rows

    def conditions(self, conditions: Conditions) -> Conditions:
        """The same rows of conditions."""
        rows = conditions[self.first : self.first + self.count]
        missing = self.size - self.count
        return rows.cat(conditions[:missing]) if missing else rows


@dataclass(frozen=True, kw_only=True)
class BatchSizes:
    """Samples at a time: ``training`` in the trained steps of rollout and update, ``sampling`` in all other steps."""

    training: BatchSize
    sampling: BatchSize
    decoding: BatchSize

    @classmethod
    def of(cls, training: int, sampling: int = 0, decoding: int = 0) -> "BatchSizes":
        """The sizes of the keys runtime.micro_batch, sampling_batch and decode_batch; 0 is as many as in training."""
        return cls(
            training=BatchSize(value=training, key="runtime.micro_batch"),
            sampling=BatchSize(value=sampling or training, key="runtime.sampling_batch"),
            decoding=BatchSize(value=decoding or training, key="runtime.decode_batch"),
        )


def batches(total: int, size: int) -> Iterator[Batch]:
    """``total`` rows in batches of ``size``, or in one of ``total`` if that is less."""
    for first in range(0, total, size):
        yield Batch(first, min(size, total - first), min(size, total))


def in_batches(total: int, size: BatchSize, run: Callable[[Batch], Result]) -> Iterator[tuple[Batch, Result]]:
    """``run`` of each batch of ``total`` rows; of half the size from where it did not fit in memory."""
    first = 0
    while first < total:
        batch = Batch(first, min(size.value, total - first), min(size.value, total))
        try:
            result = run(batch)
        except torch.OutOfMemoryError as error:
            size.halve(error)
            continue
        yield batch, result
        first += batch.count
