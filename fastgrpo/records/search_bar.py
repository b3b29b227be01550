"""How far a search is: one live bar on a terminal or in a notebook, and nothing elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastgrpo.records.live import NotebookLine


@contextmanager
def search_bar(
    num_images: int, evaluations_per_image: int, console: Console | None = None
) -> Iterator[Callable[[int], None]]:
    """Inside, what is to be told of network evaluations as they are made."""
    console = console or Console()
    columns = (
        TextColumn(f"searching {num_images} images"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("evaluations"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        advance = partial(progress.advance, progress.add_task("", total=num_images * evaluations_per_image))
        yield _shown(advance, progress, NotebookLine(console)) if console.is_jupyter else advance


def _shown(advance: Callable[[int], None], progress: Progress, line: NotebookLine) -> Callable[[int], None]:
    def watch(evaluations: int) -> None:
        advance(evaluations)
        line.update(progress.get_renderable())

    return watch
