"""The store that the ranks of this attempt share, and no former attempt has written to.

torchrun's store outlives the ranks that it restarts, and torch 2.13 gives every attempt the same one: then ranks read
each other's former addresses there, and are refused.  The count of restarts cannot tell attempts apart, since each
node counts its own.  So the first rank gives the attempt a name.  The others learn it under a name that they made up
for this one time, hence never from a former attempt.
"""

import time
import uuid
from datetime import timedelta

import torch.distributed as dist


def meet(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """The store, this rank and the number of ranks, by the environment variables of torchrun; all ranks call it.

    TimeoutError on the first rank names those that did not come.
    """
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    attempt = _invite(store, size, timeout) if rank == 0 else _ask(store, rank)
    return dist.PrefixStore(f"fastgrpo/attempt/{attempt}", store), rank, size


def _ask(store: dist.Store, rank: int) -> str:
    own = uuid.uuid4().hex
    store.set(f"fastgrpo/asks/{rank}", own)
    attempt: str = store.get(f"fastgrpo/answer/{own}").decode()
    store.set(f"fastgrpo/heard/{attempt}/{rank}", "")
    return attempt


def _invite(store: dist.Store, size: int, timeout: timedelta) -> str:
    attempt, missing = uuid.uuid4().hex, set(range(1, size))
    deadline = time.monotonic() + timeout.total_seconds()
    while missing:
        if time.monotonic() > deadline:
            raise TimeoutError(f"ranks {sorted(missing)} of {size} did not come in {timeout.total_seconds():g} s")
        for rank in sorted(missing):
            # of a former attempt, perhaps: nobody reads that answer
            if store.check([f"fastgrpo/asks/{rank}"]):
                store.set(f"fastgrpo/answer/{store.get(f'fastgrpo/asks/{rank}').decode()}", attempt)
        time.sleep(0.02)
        missing = {rank for rank in missing if not store.check([f"fastgrpo/heard/{attempt}/{rank}"])}
    return attempt
