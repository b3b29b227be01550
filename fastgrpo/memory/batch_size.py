"""How many samples run at a time: the value of a config key, half of it from when it did not fit in memory.

Those who run the same batches hold the same ``BatchSize``: rollout's window and update cut alike, also after a halving.
"""

import logging
from dataclasses import dataclass

from fastgrpo.out_of_memory import release

_log = logging.getLogger(__name__)


class DoesNotFit(RuntimeError):
    """Not even one sample fits in memory; the message says what to change."""


@dataclass(kw_only=True)
class BatchSize:
    """``value`` samples at a time, as the config key ``key`` says."""

    value: int
    key: str

    def __post_init__(self) -> None:
        if self.value < 1:
            raise ValueError(f"{self.key} must be at least 1, got {self.value}; only train plans it from memory")

    def halve(self, error: RuntimeError) -> None:
        """Go on with half as many, and say so; DoesNotFit if it is one sample that did not fit.

        ``error`` loses its traceback, whose frames hold the tensors of the batch that failed.
        """
        if self.value == 1:
            raise DoesNotFit(
                f"out of memory with {self.key}=1: {error}; set runtime.checkpointing=true, or lower model.resolution"
            ) from error
        before, self.value = self.value, self.value // 2
        _log.warning("out of memory with %s=%d; from now it is %d", self.key, before, self.value)
        release(error)
