"""What a policy rank and its scoring rank say to each other, over gloo, through the host.

A line is a gloo group of the two ranks alone: questions come from threads, beside the collectives of training, and NCCL
may deadlock on two communicators in flight on one GPU.  No pickles:
    greeting  [bytes], JSON: the scoring rank's host, what failed while it built its rewards, its golden scores
    question  [bytes, B, C, H, W], JSON: the reward, B texts and metadata, then images float32 [B, C, H, W]; or
              zeros for a goodbye
    answer    [bytes, B], what was raised, or scores float32 [B]
Numbers in brackets are int64.  Letters: B images, C H W of an image.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from threading import Lock
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# nobody asks while a policy trains, and nobody greets while weights load; a process that ends closes its connections
PATIENCE = timedelta(days=30)
GOODBYE_SECONDS = 5.0


@dataclass(kw_only=True, eq=False)
class Line:
    """As one of the two ranks holds it; ``other`` is the other one.  Where that is gone or silent: RuntimeError."""

    other: int
    # a ProcessGroupGloo, whose stubs leave out send and recv
    pair: Any
    timeout: timedelta
    free: Lock = field(default_factory=Lock)

    @classmethod
    def between(cls, policy: int, scoring: int, store: dist.Store, timeout: timedelta, *, scores: bool) -> "Line":
        """Connect, as the rank that ``scores`` or as the other; both call it."""
        # not by new_group, in which every rank of a job would have to take part
        store = dist.PrefixStore(f"line of policy rank {policy}", store)
        pair = dist.ProcessGroupGloo(store, int(scores), 2, timeout)
        return cls(other=policy if scores else scoring, pair=pair, timeout=timeout)

    def greet(self, text: bytes) -> None:
        # a policy may take longer to load than its rewards
        self.send_numbers(len(text), timeout=PATIENCE)
        self.send_text(text)

    def ask(self, about: Mapping[str, Any], images_BCHW: Tensor) -> None:
        text = json.dumps(about).encode()
        self.send_numbers(len(text), *images_BCHW.shape)
        self.send_text(text)
        self._send(images_BCHW.to("cpu", torch.float32).contiguous())

    def say_goodbye(self) -> None:
        # a scoring rank that is waited for longer is not listening yet, or no more
        self.send_numbers(0, 0, 0, 0, 0, timeout=timedelta(seconds=GOODBYE_SECONDS))

    def next_question(self) -> tuple[dict[str, Any], Tensor] | None:
        """What is asked, and images on the host; None for a goodbye."""
        num_bytes, *shape = self.receive_numbers(5)
        if num_bytes == 0:
            return None
        return json.loads(self.receive_text(num_bytes)), self.receive(*shape, dtype=torch.float32)

    def reply(self, answer: Tensor | str) -> None:
        if isinstance(answer, str):
            text = answer.encode()
            self.send_numbers(len(text), 0)
            self.send_text(text)
        else:
            self.send_numbers(0, len(answer))
            self._send(answer)

    def send_numbers(self, *numbers: int, timeout: timedelta | None = None) -> None:
        self._send(torch.tensor(numbers), timeout)

    def send_text(self, text: bytes) -> None:
        self._send(torch.frombuffer(bytearray(text), dtype=torch.uint8))

    def receive_numbers(self, count: int, timeout: timedelta = PATIENCE) -> list[int]:
        return [int(number) for number in self.receive(count, dtype=torch.int64, timeout=timeout)]

    def receive_text(self, num_bytes: int) -> str:
        return bytes(self.receive(num_bytes, dtype=torch.uint8).numpy()).decode()

    def receive(self, *shape: int, dtype: torch.dtype, timeout: timedelta | None = None) -> Tensor:
        values = torch.empty(shape, dtype=dtype)
        self.pair.recv([values], 1 - self.pair.rank(), 0).wait(timeout or self.timeout)
        return values

    def _send(self, values: Tensor, timeout: timedelta | None = None) -> None:
        # done when the other receives it
        self.pair.send([values], 1 - self.pair.rank(), 0).wait(timeout or self.timeout)
