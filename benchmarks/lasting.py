"""What two runs of one recipe have in common in ``metrics.jsonl``, however they went: all but time and memory."""

from pathlib import Path
from typing import Any

from fastgrpo.records.json_lines import read_rows

VARYING = ("seconds", "images_per_second", "peak_bytes")


def different_metrics(output: Path, undisturbed: Path) -> list[str]:
    """Each metric of two run directories, with its iteration, that is not equal or that only one of them has."""
    ours, theirs = (_lasting(path) for path in (output, undisturbed))
    return [
        f"{name} of iteration {iteration}"
        for iteration, name in sorted(ours.keys() | theirs.keys())
        if ours.get((iteration, name)) != theirs.get((iteration, name))
    ]


def _lasting(output: Path) -> dict[tuple[int, str], Any]:
    rows = read_rows(output / "metrics.jsonl")
    return {(row["iteration"], k): value for row in rows for k, value in row.items() if not k.startswith(VARYING)}
