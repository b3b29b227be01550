"""A notebook is executed by a kernel of its own: progress, results as they are shown, and its stop."""

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.live import Live

from fastgrpo.records.live import NotebookLine, live_line
from tests.library.runs import words

PROGRAM = """
import os, signal, fastgrpo
settings = {settings!r}
calls = []
def redness(images, prompts):
    calls.append(len(prompts))
    # golden pairs, the first evaluation, and an iteration, of which each is one call
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGINT)
    return images[:, 0].mean(dim=(1, 2))
"""
CELLS = (
    "fastgrpo.train(*settings, reward=redness, prompts=['a red circle'], held_out=['two blue squares'])",
    "run = fastgrpo.load({output!r}).resume(reward=redness)",
    "from threading import Thread\n"
    "t = Thread(target=lambda: run.resume('train.iterations=5', reward=redness)); t.start(); t.join()",
    "run.sample('a red circle', 'num_steps=2', 'images_per_prompt=1')",
    "run.sample('a red circle', 'num_steps=2', 'images_per_prompt=1', 'search=true', 'budget=8', reward=redness)",
    "run.evaluate('evaluate.num_steps=2', 'reward=jpeg_incompressibility', prompts=['a red circle'])",
    "(run.config['reward']['path'], run.summary['iterations'])",
)


def test_a_run_in_a_notebook(tiny_weights: Path, tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat", reason="pip install ipykernel nbclient")
    nbclient = pytest.importorskip("nbclient", reason="pip install ipykernel nbclient")
    pytest.importorskip("ipykernel", reason="pip install ipykernel nbclient")
    settings = words(tiny_weights, tmp_path / "run", "train.iterations=3", with_reward=False, with_prompts=False)
    sources = [PROGRAM.format(settings=settings), *(cell.format(output=str(tmp_path / "run")) for cell in CELLS)]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    client = nbclient.NotebookClient(notebook, timeout=120, allow_errors=True, kernel_name="python3")
    client.execute(cwd=str(tmp_path))
    _, stopped, resumed, threaded, sampled, searched, evaluated, last = [cell.outputs for cell in notebook.cells]
    assert [output.ename for output in stopped if output.output_type == "error"] == ["KeyboardInterrupt"]
    assert "left  iteration 2/3  " in _line(stopped)
    assert _text(stopped, "stdout").endswith("'resume=true', reward=...)\n")
    # no remarks of libraries, and one line that moved on
    assert "Warning" not in _text(resumed, "stderr")
    assert "left  iteration 3/3  " in _line(resumed)
    assert _line(resumed).endswith("━" * 20)
    assert "left  iteration 5/5  " in _line(threaded)
    assert {"image/png", "text/plain"} == set(sampled[-1].data)
    assert _line(searched).startswith("searching 1 images ")
    assert " 8/8 evaluations " in _line(searched)
    assert "│ all" in evaluated[-1].data["text/plain"]
    assert "\x1b" not in evaluated[-1].data["text/plain"]
    assert last[-1].data["text/plain"] == "('__main__.redness', 5)"


def _text(outputs: list[Any], name: str) -> str:
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == name)


def _line(outputs: list[Any]) -> str:
    (shown,) = [output.data["text/plain"] for output in outputs if output.output_type == "display_data"]
    return str(shown)


def test_a_line_is_drawn_where_there_is_something_to_draw_on() -> None:
    assert isinstance(live_line(Console(force_terminal=True, force_jupyter=False)), Live)
    assert isinstance(live_line(Console(force_jupyter=True)), NotebookLine)
    assert live_line(Console(force_terminal=False, force_jupyter=False)) is None
