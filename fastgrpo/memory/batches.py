"""Micro-batches of one size: the last is filled up with rows of the first, whose results are thrown away.

So there is one shape to compile, and a sample is rounded alike wherever it is in whichever batch of a kind that
is filled up to one length of texts.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from fastgrpo.memory.batch_size import BatchSize, DoesNotFit
from fastgrpo.out_of_memory import is_out_of_memory
from fastgrpo.settings import Runtime
from fastgrpo.types import Conditions

Result = TypeVar("Result")

# where sizes are asked to be planned and nothing is trained: as many 512x512 images as keep a large GPU busy
_UNPLANNED = 16


@dataclass(frozen=True)
class Batch:
    """``count`` rows from ``first``, filled up to ``size``."""

    first: int
    count: int
    size: int

    def of(self, x_BX: Tensor, dim: int = 0) -> Tensor:
        """The batch's rows of a tensor, ``size`` of them."""
        rows = x_BX.narrow(dim, self.first, self.count)
        fillers = [x_BX.narrow(dim, 0, count) for count in self._fillers(x_BX.shape[dim])]
        return torch.cat([rows, *fillers], dim=dim) if fillers else rows

    def conditions(self, conditions: Conditions) -> Conditions:
        """The same rows of conditions."""
        rows = conditions[self.first : self.first + self.count]
        fillers = [conditions[:count] for count in self._fillers(len(conditions))]
        return rows.cat(*fillers) if fillers else rows

    def _fillers(self, total: int) -> list[int]:
        """How many of the first rows fill it up: all ``total``, as often as they are needed, and then some."""
        times, rest = divmod(self.size - self.count, total)
        return [total] * times + [rest] * (rest > 0)


@dataclass(frozen=True, kw_only=True)
class BatchSizes:
    """Samples at a time: ``training`` in the trained steps of rollout and update, ``sampling`` in all other steps."""

    training: BatchSize
    sampling: BatchSize
    decoding: BatchSize

    @classmethod
    def of_runtime(cls, runtime: Runtime, most_in_share: int = 0, most: int = 0) -> "BatchSizes":
        """Those of a config; where the rows of a rank are known, as even as they divide.

        ``most_in_share``, those of an optimizer step, decide in training, so that rollout cuts as the update does.
        """
        training = runtime.micro_batch or _UNPLANNED
        sampling, decoding = runtime.sampling_batch or training, runtime.decode_batch or training
        if most > 0:
            training, sampling = even(most_in_share, training), even(most, sampling)
            decoding = even(sampling, decoding)
        return cls.of(training, sampling, decoding)

    @classmethod
    def of(cls, training: int, sampling: int = 0, decoding: int = 0) -> "BatchSizes":
        """The sizes of the keys runtime.micro_batch, sampling_batch and decode_batch; 0 is as many as in training."""
        return cls(
            training=BatchSize(value=training, key="runtime.micro_batch"),
            sampling=BatchSize(value=sampling or training, key="runtime.sampling_batch"),
            decoding=BatchSize(value=decoding or training, key="runtime.decode_batch"),
        )


def batches(total: int, size: int, most: int = 0, *, in_step: bool = False) -> Iterator[Batch]:
    """``total`` rows in batches of ``size``, or in one if they are less.

    ``most`` rows, as many or more, are those of the rank that has most: its shape is everybody's.  Ranks ``in_step``
    run as many batches as it does, of which the last may have no row.
    """
    most = max(total, most)
    for first in range(0, most if in_step else total, min(size, most)):
        yield _batch(first, total, most, size)


def in_batches(
    total: int, size: BatchSize, run: Callable[[Batch], Result], most: int = 0, *, in_step: bool = False
) -> Iterator[tuple[Batch, Result]]:
    """``run`` of each of the ``batches``; of half the size from where one did not fit in memory.

    DoesNotFit where ranks keep step, of which none can take smaller batches alone.
    """
    first, most = 0, max(total, most)
    while first < (most if in_step else total):
        batch = _batch(first, total, most, size.value)
        try:
            result = run(batch)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if in_step:
                raise out_of_step(size, error) from error
            size.halve(error)
            continue
        yield batch, result
        first += batch.size


def even(rows: int, size: int) -> int:
    """The least size that cuts ``rows`` into no more batches than ``size`` does: little is left to fill up."""
    return -(-rows // -(-rows // size))


def out_of_step(size: BatchSize, error: RuntimeError) -> DoesNotFit:
    """What to raise where ranks share their weights, so that none can halve its batches alone."""
    return DoesNotFit(
        f"out of memory with {size.key}={size.value}: {error}; lower {size.key}, which is not halved by itself where "
        "ranks share their weights and keep step"
    )


def _batch(first: int, total: int, most: int, size: int) -> Batch:
    first = min(first, total)
    return Batch(first, min(size, total - first), min(size, most))
