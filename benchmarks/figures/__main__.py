"""Write what READMEs say in figures, and the picture of the first screen, from the result files.

    python -m benchmarks.figures

Writes between the marks ``<!-- figures -->`` and ``<!-- end of figures -->`` of README.md and benchmarks/README.md.
"""

import re
from pathlib import Path

from benchmarks.figures.chosen import FIGURES, HEADLINE
from benchmarks.figures.figure import Figure
from benchmarks.figures.picture import draw, time_to_reward
from benchmarks.report import RESULTS, table

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"
_PARTS = re.compile(rf"(?<={BEGIN}\n).*?(?={END})", re.DOTALL)
PICTURE = RESULTS / "first_screen.png"


def main() -> None:
    for path, text in written().items():
        path.write_text(text)
    draw(PICTURE, time_to_reward(HEADLINE[0].data["sides"]))


def written() -> dict[Path, str]:
    """The READMEs, as they have to be."""
    first, all_ = ROOT / "README.md", ROOT / "benchmarks" / "README.md"
    return {
        first: _PARTS.sub(lambda _: f"{_table(HEADLINE, 'benchmarks/results')}\n", first.read_text(encoding="utf-8")),
        all_: _PARTS.sub(lambda _: f"{_figures()}\n\n{_index()}\n", all_.read_text(encoding="utf-8")),
    }


def _figures() -> str:
    return "\n\n".join(f"### {theme}\n\n{_table(figures, 'results')}" for theme, figures in FIGURES.items())


def _table(figures: tuple[Figure, ...], results: str) -> str:
    rows = [
        [figure.what, figure.value, figure.device, f"[`{figure.commit}`]({results}/{figure.result}.md)"]
        for figure in figures
    ]
    return table(["what", "figure", "on", "commit"], rows)


def _index() -> str:
    """All result files, those too that no figure is from."""
    rows = [
        [f"[{_title(path)}](results/{path.name})", f"`{path.stem.rsplit('_', 1)[1]}`"]
        for path in sorted(RESULTS.glob("*.md"))
    ]
    return f"### All results\n\n{table(['result', 'commit'], rows)}"


def _title(path: Path) -> str:
    return path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")


if __name__ == "__main__":
    main()
