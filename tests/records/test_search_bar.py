"""The bar of a search: on a terminal as far as evaluations are made, nothing elsewhere."""

import io

from rich.console import Console

from fastgrpo.records.search_bar import search_bar


def test_a_bar_counts_evaluations_on_a_terminal() -> None:
    written = io.StringIO()
    with search_bar(3, 64, Console(file=written, force_terminal=True, width=100)) as watch:
        watch(64)
        watch(32)
    assert "searching 3 images" in written.getvalue()
    assert "96/192" in written.getvalue()


def test_a_pipe_gets_nothing() -> None:
    written = io.StringIO()
    with search_bar(3, 64, Console(file=written)) as watch:
        watch(64)
    assert written.getvalue() == ""
