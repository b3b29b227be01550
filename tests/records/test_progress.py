"""While a model is compiled, the progress display says so."""

import io
import time

import pytest
from rich.console import Console

from fastgrpo.records.progress import Progress


class Compiler:
    """Counts graphs, as ``num_compilations`` does, and hours, as a clock does."""

    def __init__(self) -> None:
        self.count = 7
        self.now = 100.0

    def num_compilations(self) -> int:
        return self.count

    def clock(self) -> float:
        return self.now


def make_progress(compiler: Compiler, console: Console, look_every_seconds: float = 3600.0) -> Progress:
    return Progress(
        3,
        every=1,
        console=console,
        clock=compiler.clock,
        num_compilations=compiler.num_compilations,
        look_every_seconds=look_every_seconds,
    )


def test_a_log_file_hears_of_compilations_at_once_and_twice_a_minute() -> None:
    compiler, file = Compiler(), io.StringIO()
    with make_progress(compiler, Console(file=file)) as progress:
        progress.show_compilations()
        for seconds, count in ((0, 1), (10, 2), (29, 9), (45, 12), (50, 12)):
            compiler.now, compiler.count = 100.0 + seconds, 7 + count
            progress.show_compilations()
        progress.update(1, {})
        # nothing new since then
        progress.show_compilations()
        compiler.now, compiler.count = 200.0, 20
        progress.show_compilations()
    assert file.getvalue().splitlines() == [
        "iteration 0/3  compiling: 1 graph, 0:00",
        "iteration 0/3  compiling: 12 graphs, 0:45",
        "1:40 left  iteration 1/3",
        "iteration 1/3  compiling: 1 graph, 0:00",
    ]


@pytest.mark.parametrize("is_terminal", [False, True], ids=["log file", "terminal"])
def test_compilations_are_shown_while_the_iteration_runs(is_terminal: bool) -> None:
    compiler, file = Compiler(), io.StringIO()
    console = Console(file=file, force_terminal=is_terminal, width=100, color_system=None)
    with make_progress(compiler, console, look_every_seconds=0.01):
        compiler.count = 12
        deadline = time.monotonic() + 10
        while "compiling: 5 graphs, 0:00" not in file.getvalue():
            assert time.monotonic() < deadline
            time.sleep(0.01)
