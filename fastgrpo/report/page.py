"""The page: one HTML file with everything inside, plots by Bokeh, and no reference to anything outside.

The page forbids itself the network by its own Content-Security-Policy.  What comes from a run, prompts above all, is
text: Jinja escapes it in the page, Bokeh in its plots, and the script writes it as text.
"""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bokeh.document import Document
from bokeh.embed import components
from bokeh.plotting import figure
from bokeh.resources import Resources
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fastgrpo.files.run_directory import RunDirectory
from fastgrpo.files.whole import write_whole
from fastgrpo.report.curves import FIRST_AXIS, color_of, draw_curves
from fastgrpo.report.differences import as_yaml, changed_on_the_way, differences
from fastgrpo.report.environment import environments
from fastgrpo.report.gallery import gallery_page
from fastgrpo.report.headline import duration, headline_of
from fastgrpo.report.run import AXES, read_runs
from fastgrpo.report.search import search_page
from fastgrpo.report.times import times_of

_HERE = Path(__file__).parent


def write_report(directories: Sequence[Path], output: Path | None = None) -> Path:
    """Write the report of some run directories, into the first of them if ``output`` is not given; returns its path.

    ValueError for a directory that is no run, or an output that cannot be written.
    """
    page = render(directories)
    path = (output or RunDirectory(directories[0]).report).expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, page.encode())
    except OSError as error:
        raise ValueError(f"cannot write {path} ({error.strerror}); give output= another file") from error
    return path


def render(directories: Sequence[Path]) -> str:
    """The page of some run directories."""
    runs = read_runs(directories)
    curves, searches = draw_curves(runs), [search_page(run, place) for place, run in enumerate(runs)]
    gallery = gallery_page(runs)
    plots = {f"curve {panel.metric}": panel.plot for _, panels in curves.groups for panel in panels}
    for number, found in enumerate(searches):
        if found is not None:
            plots[f"scores {number}"] = found.scores
            if found.scatter is not None:
                plots[f"scatter {number}"] = found.scatter
    script, divs = _embedded(plots)
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"duration": duration, "yaml": as_yaml}
    return environment.get_template("page.html").render(
        runs=runs,
        colors=[color_of(number) for number in range(len(runs))],
        headlines=[headline_of(run) for run in runs],
        curves=curves,
        gallery=gallery,
        times=[times_of(run) for run in runs],
        searches=searches,
        differences=differences(runs),
        environments=environments(runs),
        version=version("fastgrpo"),
        changes=[changed_on_the_way(run) for run in runs],
        axes=AXES,
        first_axis=FIRST_AXIS,
        divs=divs,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        data=_json({"axes": AXES, "handles": curves.handles, "gallery": gallery.data}),
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        bokeh=Markup(Resources(mode="inline", components=["bokeh"]).render_js()),
        plots=script,
        page_script=Markup((_HERE / "page.js").read_text(encoding="utf-8")),
    )


def _embedded(plots: dict[str, figure]) -> tuple[Markup, dict[str, Markup]]:
    """The script that draws the plots, and the elements that it draws into."""
    if not plots:
        return Markup(), {}
    document = Document()
    # otherwise each plot that is added looks at all others again
    with document.models.freeze():
        for plot in plots.values():
            document.add_root(plot)
    script, divs = components({**plots})
    return Markup(script), {name: Markup(div) for name, div in divs.items()}


def _json(data: Any) -> Markup:
    """JSON that cannot end the element that it is in."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
