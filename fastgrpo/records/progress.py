"""How a run shows where it stands: one live line on a terminal, a plain line now and then in a log file."""

import math
import time
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text


class Progress:
    """Call ``update`` once an iteration; use it as a context manager.

    ``first`` is the iteration that a resumed run starts after; a run ends after ``total`` iterations or ``max_seconds``
    of training.  Without a terminal, each ``every``-th line is printed.
    """

    def __init__(
        self,
        total: int,
        *,
        first: int = 0,
        max_seconds: float = math.inf,
        every: int = 10,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self._total, self._first, self._max_seconds, self._every = total, first, max_seconds, every
        self._console = console or Console()
        self._clock, self._start = clock, clock()
        # the last value of each, since evaluations are rare
        self._values: dict[str, float] = {}
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None

    def __enter__(self) -> "Progress":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def update(self, iteration: int, values: Mapping[str, float]) -> None:
        """Show the state after ``iteration``; ``values`` has the keys of ``metrics.METRICS``."""
        self._values |= values
        line = self._line(iteration)
        if self._live:
            row = Table.grid(padding=(0, 1))
            row.add_row(Text(line, no_wrap=True), ProgressBar(self._total, iteration, width=20))
            self._live.update(row, refresh=True)
        elif iteration % self._every == 0 or iteration in (self._first + 1, self._total) or self._seconds_left == 0:
            self._console.out(line, highlight=False)

    def _line(self, iteration: int) -> str:
        parts = [f"iteration {iteration}/{self._total}"]
        if "images_per_second" in self._values:
            parts.append(f"{self._values['images_per_second']:.1f} images/s")
        if "reward/total" in self._values:
            parts.append(f"reward {self._values['reward/total']:.3f}")
        parts += [f"{name} {value:.3f}" for name, value in self._values.items() if name.startswith("eval/")]
        done = iteration - self._first
        if done > 0:
            left = (self._clock() - self._start) / done * (self._total - iteration)
            parts.append(f"{_duration(min(left, self._seconds_left))} left")
        return "  ".join(parts)

    @property
    def _seconds_left(self) -> float:
        return max(0.0, self._max_seconds - self._values.get("seconds", 0.0))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
