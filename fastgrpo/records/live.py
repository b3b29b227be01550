"""One line that is drawn again and again, where there is something to draw it on: a terminal, or a notebook's cell."""

from importlib import import_module
from io import StringIO
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live


class NotebookLine:
    """As rich's ``Live``, which in a notebook needs ipywidgets; what it shows last stays in the notebook's file."""

    def __init__(self, console: Console) -> None:
        self._width = console.width
        self._shown: Any = None

    def start(self) -> None:
        """Nothing is shown before the first update."""

    def update(self, renderable: RenderableType, *, refresh: bool = False) -> None:
        """Show it; ``refresh`` is always meant."""
        text = StringIO()
        # without colors a bar ends where it has come to
        console = Console(file=text, width=self._width, no_color=True, force_jupyter=False, force_terminal=False)
        console.print(renderable)
        data = {"text/plain": text.getvalue().rstrip()}
        if self._shown is None:
            self._shown = import_module("IPython.display").display(data, raw=True, display_id=True)
        else:
            self._shown.update(data, raw=True)

    def stop(self) -> None:
        """The line stays as it is."""


def live_line(console: Console) -> Live | NotebookLine | None:
    """What draws it, None where plain lines are better."""
    if console.is_jupyter:
        return NotebookLine(console)
    return Live(console=console, auto_refresh=False) if console.is_terminal else None
