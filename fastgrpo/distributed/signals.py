"""Signals that ask a run to save and stop: SIGTERM, and SIGUSR1, which schedulers send minutes before they kill."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """``number`` is that of the last of these signals which came inside ``heard``, 0 while there is none."""

    def __init__(self) -> None:
        self.number = 0

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Inside, the signals are noted instead of ending the process."""

        def note(number: int, _: FrameType | None) -> None:
            self.number = number

        before = {number: signal.signal(number, note) for number in STOPPING}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
