"""What a report reads of a run: its directory as it is at this moment, also of one that is still training."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from fastgrpo.files.run_directory import RunDirectory
from fastgrpo.records.gallery import Gallery, read_galleries
from fastgrpo.records.json_lines import read_rows

# what curves are drawn against
AXES = {"seconds": "training time [s], without evaluation", "images": "images made", "iteration": "iteration"}


@dataclass(frozen=True)
class Run:
    """``name`` tells it from the others of its report; ``summary`` is empty until a run has ended once."""

    name: str
    directory: RunDirectory
    rows: list[dict[str, Any]]
    config: dict[str, Any]
    summary: dict[str, Any]
    galleries: list[Gallery]
    searches: list[dict[str, Any]]

    @cached_property
    def metrics(self) -> list[str]:
        """Every number that some row has, in the order in which they came."""
        names = dict.fromkeys(name for row in self.rows for name in row)
        return [name for name in names if name not in AXES and name != "nonfinite"]

    def points(self, metric: str) -> list[tuple[dict[str, float], float]]:
        """(place on each axis, value) of each row that has the metric as a finite number."""
        return list(self._points(metric))

    def _points(self, metric: str) -> Iterator[tuple[dict[str, float], float]]:
        for row in self.rows:
            value = number(row.get(metric))
            if value is not None:
                # before training there are no images
                places = {"images": 0.0} if row["iteration"] == 0 else {}
                found = {axis: number(row.get(axis)) for axis in AXES}
                yield places | {axis: place for axis, place in found.items() if place is not None}, value

    def num_missing(self, metric: str) -> int:
        """Rows in which the metric was not finite."""
        return sum(metric in row and number(row[metric]) is None for row in self.rows)

    @cached_property
    def evaluated(self) -> set[int]:
        """Iterations after which there was an evaluation; images of others are of one that a resumption dropped."""
        return {row["iteration"] for row in self.rows if any(name.startswith("eval/") for name in row)}

    @property
    def is_over(self) -> bool:
        """Whether it came to the end that its config wants."""
        training, last = self.config.get("train") or {}, self.rows[-1] if self.rows else {}
        iterations, minutes = number(training.get("iterations")), number(training.get("max_minutes"))
        return (iterations is not None and last.get("iteration", 0) >= iterations) or (
            minutes is not None and (number(last.get("seconds")) or 0.0) >= 60 * minutes
        )


def number(value: Any) -> float | None:
    """The value if it is a finite number, else None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs in these directories; ValueError for one that is none, or is given twice."""
    resolved = [path.expanduser().resolve() for path in paths]
    if not resolved:
        raise ValueError("nothing to report on; give run=outputs/NAME, once for each run")
    if twice := {str(path) for path in resolved if resolved.count(path) > 1}:
        raise ValueError(f"run={min(twice)} is given twice; give each run once")
    return [_read(path, name) for path, name in zip(resolved, _names(resolved), strict=True)]


def _read(path: Path, name: str) -> Run:
    directory = RunDirectory(path)
    if not directory.config.is_file():
        raise ValueError(f"run={path} is not a run directory, which has a config.yaml; give run=outputs/NAME")
    try:
        config: Any = OmegaConf.to_container(OmegaConf.load(directory.config), resolve=False)
        if not isinstance(config, dict):
            raise ValueError("no mapping")
    except (OSError, ValueError, OmegaConfBaseException, YAMLError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{directory.config} is not the config of a run ({said}); give another run=") from error
    rows = read_rows(directory.metrics)
    run = Run(name, directory, rows, config, _summary(directory), [], read_rows(directory.search))
    return replace(run, galleries=[one for one in read_galleries(directory.images) if one.iteration in run.evaluated])


def _summary(directory: RunDirectory) -> dict[str, Any]:
    try:
        found = json.loads(directory.summary.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _names(paths: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as tell them apart."""
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len({*names}) == len(names):
            break
    return names
