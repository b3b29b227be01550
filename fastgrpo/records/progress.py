"""How a run shows where it stands: one live line on a terminal or in a notebook, a plain line now and then in a log."""

import math
import threading
import time
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fastgrpo.records.live import live_line
from fastgrpo.records.remarks import Remark

# of a log file that says what is being compiled
_SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Call ``update`` once an iteration; use it as a context manager.

    ``first`` is the iteration that a resumed run starts after; a run ends after ``total`` iterations or ``max_seconds``
    of training.  Without a terminal, each ``every``-th line is printed.  While ``num_compilations()`` grows between two
    updates, that is shown: the first iteration of a compiled model takes minutes, and must not look like a hang.
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
        num_compilations: Callable[[], int] = lambda: 0,
        look_every_seconds: float = 1.0,
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self._total, self._first, self._max_seconds, self._every = total, first, max_seconds, every
        self._console = console or Console()
        self._clock, self._start = clock, clock()
        # the last value of each, since evaluations are rare
        self._values: dict[str, float] = {}
        self._live = live_line(self._console)
        self._iteration = first
        self._remark: Remark | None = None
        self._num_compilations, self._look_every_seconds = num_compilations, look_every_seconds
        self._num_compiled, self._compiling_since, self._next_line = num_compilations(), math.nan, math.nan
        self._lock, self._is_over = threading.Lock(), threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Progress":
        if self._live:
            self._live.start()
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._watcher.join()
        if self._live:
            self._live.stop()

    def update(self, iteration: int, values: Mapping[str, float]) -> None:
        """Show the state after ``iteration``; ``values`` has the keys of ``metrics.METRICS``."""
        with self._lock:
            self._iteration = iteration
            self._num_compiled, self._compiling_since = self._num_compilations(), math.nan
            self._values |= values
            line = self._line(iteration)
            if self._live:
                self._draw(line)
            elif iteration % self._every == 0 or iteration in (self._first + 1, self._total) or self._seconds_left == 0:
                self._console.out(line, highlight=False)

    def remark(self, remark: Remark | None) -> None:
        """Say it when its state is new, on a line of its own, and its state in each line until there is none."""
        with self._lock:
            if remark and (self._remark is None or remark.state != self._remark.state):
                self._console.print(str(remark), highlight=False, markup=False, style="yellow")
            self._remark = remark

    def show_compilations(self) -> None:
        """Show how many graphs were compiled since the last update, and for how long, if there are any."""
        with self._lock:
            count = self._num_compilations() - self._num_compiled
            if count == 0:
                return
            now = self._clock()
            if math.isnan(self._compiling_since):
                self._compiling_since = self._next_line = now
            line = (
                f"iteration {self._iteration}/{self._total}  "
                f"compiling: {count} graph{'s' * (count > 1)}, {_duration(now - self._compiling_since)}"
            )
            if self._live:
                self._draw(line)
            elif now >= self._next_line:
                self._next_line = now + _SECONDS_BETWEEN_LINES
                self._console.out(line, highlight=False)

    def _watch(self) -> None:
        while not self._is_over.wait(self._look_every_seconds):
            self.show_compilations()

    def _draw(self, line: str) -> None:
        assert self._live is not None
        row = Table.grid(padding=(0, 1))
        row.add_row(Text(line, no_wrap=True), ProgressBar(self._total, self._iteration, width=20))
        self._live.update(row, refresh=True)

    def _line(self, iteration: int) -> str:
        parts = [f"iteration {iteration}/{self._total}"]
        if self._remark:
            parts.append(self._remark.state)
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
