"""What runs were computed on and by: hardware, versions, commit, as ``summary.json`` has them."""

from collections.abc import Sequence
from typing import Any

from fastgrpo.report.run import Run

UNKNOWN = "not known before the run's end"


def environments(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """A line a fact: its name, and what it is for each run."""
    columns = [_facts(run) for run in runs]
    return [
        (
            name,
            [column.get(name, UNKNOWN if not run.summary else "") for column, run in zip(columns, runs, strict=True)],
        )
        for name in dict.fromkeys(name for column in columns for name in column)
    ]


def _facts(run: Run) -> dict[str, str]:
    hardware, versions = _of(run, "hardware"), _of(run, "versions")
    gpus = hardware.pop("gpus", None)
    counts = [f"{gpus.count(gpu)} × {gpu}" for gpu in dict.fromkeys(gpus)] if isinstance(gpus, list) else []
    return {
        "directory": str(run.directory.path),
        "GPU": ", ".join(counts) or ("none" if run.summary else UNKNOWN),
        **{name.replace("_", " "): str(value) for name, value in hardware.items()},
        "commit": str(run.summary.get("commit") or "") or ("not a checkout" if run.summary else UNKNOWN),
        **{name: str(value or "not installed") for name, value in versions.items()},
    }


def _of(run: Run, key: str) -> dict[str, Any]:
    found = run.summary.get(key)
    return dict(found) if isinstance(found, dict) else {}
