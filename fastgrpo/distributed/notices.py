"""What the watchers of the ranks write for each other, in the key-value store that the ranks met at.

at/RANK      where a rank stands            failed      what ends the run: the first to write it wins
left/RANK    what a rank left with          asked       the ranks whose stacks are wanted
stack/RANK   the answer
"""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta

import torch.distributed as dist

from fastgrpo.distributed.failure import Failure
from fastgrpo.distributed.standing import Standing


class Notices:
    """A connection of its own for each thread: one that waits for an answer blocks all that share it.

    Every method raises RuntimeError when the store is gone.  ``prefix`` keeps the attempts of a restarted job apart:
    torchrun's store outlives them.
    """

    def __init__(self, prefix: str, size: int, connect_seconds: float) -> None:
        self.address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        host, _, port = self.address.rpartition(":")
        timeout = timedelta(seconds=connect_seconds)
        store = dist.TCPStore(host, int(port), is_master=False, timeout=timeout, wait_for_workers=False)
        self._store = dist.PrefixStore(f"fastgrpo/watch/{prefix}", store)
        self._size = size

    def stand(self, standing: Standing) -> None:
        self._store.set(f"at/{standing.rank}", json.dumps(asdict(standing)))

    def standings(self, ranks: Sequence[int]) -> list[Standing]:
        """Of ranks that have written theirs."""
        found = self._store.multi_get([f"at/{rank}" for rank in ranks])
        return [Standing(**json.loads(value)) for value in found]

    def fail(self, failure: Failure) -> Failure:
        """End the run by this failure, or by the one that was first; returns that."""
        return _failure(self._store.compare_set("failed", "", json.dumps(failure.values)))

    def failure(self) -> Failure | None:
        return _failure(self._store.get("failed")) if self._store.check(["failed"]) else None

    def leave(self, rank: int, failure: Failure | None) -> None:
        """Say that a rank is done with the run, or was thrown out of it by what it raised."""
        self._store.set(f"left/{rank}", json.dumps(failure and failure.values))
        self._store.add("num_left", 1)

    @property
    def have_all_left(self) -> bool:
        return self._store.add("num_left", 0) == self._size

    def causes(self, ranks: Sequence[int]) -> list[Failure]:
        """What some ranks left with by their own doing, and not because another had failed."""
        keys = [key for rank in ranks if self._store.check([key := f"left/{rank}"])]
        found = [Failure.of_values(values) for key in keys if (values := json.loads(self._store.get(key)))]
        return [failure for failure in found if not failure.is_echo]

    def say_goodbye(self, seconds: float, *, last: bool) -> None:
        """The last thing a rank writes.  ``last``: wait so long for the goodbyes of all others."""
        num_gone = self._store.add("num_gone", 1)
        deadline = time.monotonic() + seconds
        while last and num_gone < self._size and time.monotonic() < deadline:
            time.sleep(0.05)
            num_gone = self._store.add("num_gone", 0)

    def ask(self, ranks: Sequence[int]) -> None:
        """Want the stacks of some ranks."""
        self._store.set("asked", json.dumps(list(ranks)))

    def is_asked(self, rank: int) -> bool:
        return self._store.check(["asked"]) and rank in json.loads(self._store.get("asked"))

    def answer(self, rank: int, stack: str) -> None:
        self._store.set(f"stack/{rank}", stack)

    def answers(self, ranks: Sequence[int], seconds: float) -> dict[int, str]:
        """The stacks of those that answer in time."""
        keys = {rank: f"stack/{rank}" for rank in ranks}
        deadline = time.monotonic() + seconds
        while not self._store.check(list(keys.values())) and time.monotonic() < deadline:
            time.sleep(0.05)
        return {rank: self._store.get(key).decode() for rank, key in keys.items() if self._store.check([key])}


def _failure(value: bytes) -> Failure:
    return Failure.of_values(json.loads(value))
