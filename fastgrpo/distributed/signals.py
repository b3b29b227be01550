"""Signals that ask a run to save and stop: SIGTERM, Ctrl-C, and SIGUSR1, which schedulers send before they kill.

The first Ctrl-C lets the iteration end; the second ends the process at once.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """``number`` is that of the last of these signals which came inside ``heard``, 0 while there is none."""

    def __init__(self) -> None:
        self.number = 0

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Inside, the signals are noted instead of ending the process; only the main thread of one is sent any."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in STOPPING}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT:
            # torchrun passes the terminal's signal on to ranks that have it already
            if self.number == signal.SIGINT and "TORCHELASTIC_RUN_ID" not in os.environ:
                raise KeyboardInterrupt
            if os.environ.get("RANK", "0") == "0":
                print(
                    "stopping after this iteration, which will be saved; Ctrl-C again stops at once, without saving",
                    file=sys.stderr,
                )
        self.number = number
