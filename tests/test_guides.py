"""README and the guides beside the code: their links, their lines, and what they quote."""

import re
from pathlib import Path

import pytest

from fastgrpo.cli import COMMANDS

ROOT = Path(__file__).parents[1]
GUIDES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "fastgrpo").rglob("*.md")),
    ROOT / "kernels" / "README.md",
    ROOT / "benchmarks" / "README.md",
]


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _anchors(path: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("guide", GUIDES, ids=_name)
def test_every_file_and_heading_that_is_linked_exists(guide: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", guide.read_text(encoding="utf-8"))
    for link in links:
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        path = guide.parent / name if name else guide
        assert path.exists(), link
        assert not anchor or anchor in _anchors(path), link


@pytest.mark.parametrize("guide", GUIDES, ids=_name)
def test_no_line_is_too_long_but_those_of_tables(guide: Path) -> None:
    lines = guide.read_text(encoding="utf-8").splitlines()
    # a link cannot be broken
    long = [line for line in lines if len(re.sub(r"\(\S+\)", "", line)) > 130 and not line.startswith("|")]
    assert long == []


@pytest.mark.parametrize("guide", GUIDES, ids=_name)
def test_rows_of_a_table_have_as_many_cells_as_its_head(guide: Path) -> None:
    width = 0
    for line in guide.read_text(encoding="utf-8").splitlines():
        cells = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        assert not (width and cells) or cells == width, line
        width = cells


@pytest.mark.parametrize("guide", GUIDES, ids=_name)
def test_every_command_that_is_named_exists(guide: Path) -> None:
    text = guide.read_text(encoding="utf-8")
    blocks = "".join(re.findall(r"^```(?:bash)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    assert set(re.findall(r"(?:^|&& |[A-Z_]=\S+ )fastgrpo (\S+)", blocks, re.MULTILINE)) <= set(COMMANDS)
    for module in re.findall(r"python -m (benchmarks[\w.]*)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
