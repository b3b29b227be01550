"""The ranks of a run, on torch.distributed: who this process is, and the few things that ranks tell each other.

Ranks compute the same iteration on rows of their own (``spread.py``).  What travels: scores and rewards, one sum of
gradients an optimizer step, statistics.  Each of these is a method of ``World``; a run of one process is a world of one
rank, whose methods return at once.  No pickle is sent: numbers travel as tensors, all else as JSON.
"""

import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from fastgrpo.device_error import is_device_error
from fastgrpo.distributed.meeting import meet
from fastgrpo.distributed.spread import Spread
from fastgrpo.on_device import on_device
from fastgrpo.profiling.timing import waiting

Result = TypeVar("Result")


class RankFailure(RuntimeError):
    """Another rank could not do its part; the message says which, and why."""


@dataclass(kw_only=True, eq=False)
class World:
    """One rank of ``size``.  ``group`` carries tensors on ``device``, ``control`` what is on the host.

    ``waiting_in`` is what this rank waits for the others in, while it does; ``num_exchanges`` counts how often it has.
    NCCL's calls return before the others have come, so an exchange lasts until its result is on the host, which it is
    wanted on anyway; only ``sum_`` is read by nobody, and is waited for in the next exchange.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    group: dist.ProcessGroup | None = None
    control: dist.ProcessGroup | None = None
    waiting_in: str = ""
    num_exchanges: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this rank is the one that writes files and talks to the user."""
        return self.rank == 0

    def gather(self, compute: Callable[[], Tensor], spread: Spread, num_columns: int, what: str) -> Tensor:
        """All rows [B, C] in order, on every rank, of which ``compute`` returns this rank's [b, C] in float32.

        Where it raises on some rank, RankFailure is raised on all; a world of one rank raises what was raised, and so
        does a rank whose GPU has failed, which can tell the others nothing.
        """
        order_B = torch.tensor(spread.order)
        if self.size == 1:
            values_BC = compute()
            return values_BC[on_device(order_B.argsort(), values_BC.device)]
        # a last row says whether the others are to be believed
        padded = torch.zeros(spread.most + 1, num_columns, device=self.device)
        error = None
        try:
            values_bC = compute()
            padded[: len(values_bC)] = values_bC
            padded[-1] = 1.0
        except Exception as raised:
            if is_device_error(raised):
                raise
            error = raised
        with self._exchange(what):
            everyone = self._all_gather(padded)
            # NCCL returns at once: this is where other ranks are waited for
            all_are_well = bool(everyone[:, -1].all())
        if not all_are_well:
            self._raise_together(error)
        kept = [everyone[rank, : len(rows)] for rank, rows in enumerate(spread.rows)]
        return torch.cat(kept)[on_device(order_B.argsort(), self.device)]

    def table(self, values_C: Tensor, what: str) -> Tensor:
        """The numbers of every rank, [ranks, C], on the host: on a GPU this waits for them, and for the other ranks."""
        if self.size == 1:
            return values_C[None].cpu()
        with self._exchange(what):
            return self._all_gather(values_C).cpu()

    def sum_(self, tensors: Sequence[Tensor], what: str) -> None:
        """Replace tensors by their sums over the ranks, equal to the bit on all of them: one call, however many."""
        if self.size == 1 or not tensors:
            return
        together = torch.cat([tensor.flatten() for tensor in tensors])
        with self._exchange(what):
            dist.all_reduce(together, group=self.group)
        parts = together.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(list(tensors), [part.view_as(t) for part, t in zip(parts, tensors, strict=True)])

    def to_first(self, tensors: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
        """Named tensors of all ranks on the first one, on the host: for what only it needs, as images to show.

        Names differ from rank to rank.  On the others nothing.
        """
        if self.size == 1:
            return {name: tensor.cpu() for name, tensor in tensors.items()}
        own = safetensors.torch.save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
        with self._exchange(what):
            lengths = self._lengths(own)
            everyone = _rooms(max(lengths), self.size if self.is_first else 0)
            dist.gather(_padded(own, max(lengths)), everyone or None, group=self.control, group_dst=0)
        parts = [safetensors.torch.load(_cut(room, length)) for room, length in zip(everyone, lengths, strict=False)]
        return {name: tensor for part in parts for name, tensor in part.items()}

    def everyones(self, value: Result, what: str) -> list[Result]:
        """The values of all ranks, small ones: they travel as JSON through the host, which makes lists of tuples."""
        if self.size == 1:
            return [value]
        own = json.dumps(value).encode()
        with self._exchange(what):
            lengths = self._lengths(own)
            everyone = _rooms(max(lengths), self.size)
            dist.all_gather(everyone, _padded(own, max(lengths)), group=self.control)
        return [json.loads(_cut(room, length)) for room, length in zip(everyone, lengths, strict=True)]

    def on_first(self, run: Callable[[], Result], what: str) -> Result:
        """What ``run`` returns on the first rank, on every rank, as ``everyones`` would; where it raises, all raise."""
        if self.size == 1:
            return run()
        box, error = b"", None
        if self.is_first:
            try:
                box = json.dumps([run(), None]).encode()
            except Exception as raised:
                error, box = raised, json.dumps([None, _described(0, raised)]).encode()
        with self._exchange(what):
            length = torch.tensor([len(box)])
            dist.broadcast(length, group=self.control, group_src=0)
            text = _padded(box, int(length))
            dist.broadcast(text, group=self.control, group_src=0)
        result, failure = json.loads(_cut(text, len(text)))
        if failure is not None:
            raise error or RankFailure(failure)
        return result  # type: ignore[no-any-return]

    def together(self, run: Callable[[], Result], what: str) -> Result:
        """What ``run`` returns on this rank; where it raises on some rank, it raises on all, as ``gather`` does."""
        if self.size == 1:
            return run()
        result, error = None, None
        try:
            result = run()
        except Exception as raised:
            error = raised
        failures = self.everyones(None if error is None else _described(self.rank, error), what)
        if any(failures):
            raise error or RankFailure("; ".join(filter(None, failures)))
        return result  # type: ignore[return-value]

    def barrier(self, what: str) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            with self._exchange(what):
                dist.barrier(group=self.control)

    def _lengths(self, own: bytes) -> list[int]:
        everyone = torch.empty(self.size, dtype=torch.int64)
        dist.all_gather(list(everyone.split(1)), torch.tensor([len(own)]), group=self.control)
        return everyone.tolist()

    def _all_gather(self, tensor: Tensor) -> Tensor:
        everyone = tensor.new_empty(self.size, *tensor.shape)
        dist.all_gather(list(everyone.unbind()), tensor.contiguous(), group=self.group)
        return everyone

    def _raise_together(self, error: Exception | None) -> None:
        failures = self.everyones(None if error is None else _described(self.rank, error), "failures")
        raise RankFailure("; ".join(filter(None, failures))) from error

    @contextmanager
    def _exchange(self, what: str) -> Iterator[None]:
        # not cleared on failure: then it says where this rank stood
        self.waiting_in = what
        self.num_exchanges += 1
        with waiting():
            yield
        self.waiting_in = ""


def join_world(device: str, timeout_seconds: float) -> World:
    """The world that torchrun's environment variables describe, or a world of one where there are none.

    Each rank takes the CUDA device of its local rank.  Call ``leave_world`` at the end.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return World(device=torch.device(device))
    own = torch.device(device)
    if own.type == "cuda":
        own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(own)
    timeout = timedelta(seconds=timeout_seconds)
    backend = "nccl" if own.type == "cuda" else "gloo"
    store, rank, size = meet(timeout)
    device_id = own if own.type == "cuda" else None
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout, device_id=device_id)
    # a number to ranks that are not in it, of which there are none
    control: Any = dist.new_group(backend="gloo", timeout=timeout)
    return World(rank=rank, size=size, device=own, group=dist.group.WORLD, control=control)


def leave_world() -> None:
    """End what ``join_world`` began."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _rooms(length: int, number: int) -> list[Tensor]:
    return [torch.empty(length, dtype=torch.uint8) for _ in range(number)]


def _padded(text: bytes, length: int) -> Tensor:
    return torch.frombuffer(bytearray(text.ljust(length, b"\0")), dtype=torch.uint8)


def _cut(room: Tensor, length: int) -> bytes:
    return bytes(room[:length].numpy())


def _described(rank: int, error: Exception) -> str:
    return f"rank {rank} on {socket.gethostname()}: {type(error).__name__}: {error}"
