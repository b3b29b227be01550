"""``fastgrpo runs``: what runs there are below a directory, what each has reached, and whether it goes on.

Everything is read from the files of the run directories as data; what cannot be read is shown as unknown.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from fastgrpo.files.run_directory import RunDirectory
from fastgrpo.records.evaluations import evaluated, total, weights_of
from fastgrpo.records.json_lines import read_rows
from fastgrpo.records.state import FAILED, RUNNING, STOPPED, median_speed, state_of

_UNKNOWN = "?"
# of a table: columns that may be cut, down to so many characters
_NAMES, _LEAST_NAME, _GAP = ("run", "recipe", "model", "reward"), 6, 2


def runs(config: DictConfig) -> None:
    """Print the runs of a checked ``runs`` config; ValueError for a directory that is not there."""
    top = Path(config["in"]).expanduser()
    if not top.is_dir():
        raise ValueError(f"in={top} is not a directory; name the one that runs are written into")
    found = sorted((told_of(path) for path in run_directories(top)), key=lambda run: run["modified"], reverse=True)
    if config.json:
        print(json.dumps(found, indent=2))
    elif not found:
        print(f"no runs in {top}; fastgrpo train begins one")
    else:
        print("\n".join(_table(found, top, shutil.get_terminal_size((80, 24)).columns)))


def run_directories(top: Path) -> Iterator[Path]:
    """The run directories at ``top`` and below it, none of which lies in another."""
    for path, below, names in os.walk(top):
        directory = Path(path)
        # the config of a job that waits in a queue is alone
        if "metrics.jsonl" in names or ("config.yaml" in names and {"checkpoints", "images"} & {*below}):
            below.clear()
            yield directory
        below[:] = sorted(name for name in below if not name.startswith("."))


def told_of(path: Path) -> dict[str, Any]:
    """What is known of a run, as plain data; null where its files do not say it."""
    directory = RunDirectory(path)
    config, rows = _config(directory.config), _rows(directory.metrics)
    training = [row for row in rows if "loss" in row or "reward/total" in row]
    scores = evaluated(rows)
    weights = weights_of(config)
    first, last = (total(scores[place], weights) if scores else None for place in (0, -1))
    known = [value for row in scores if (value := total(row, weights)) is not None]
    state, error = state_of(path, config, rows)
    return {
        "run": str(path),
        "recipe": _recipe(config),
        "model": _model(config),
        "reward": "+".join(weights) or None,
        "state": state,
        "error": error,
        "iteration": rows[-1].get("iteration") if rows else 0,
        "iterations": _of(config, "train").get("iterations"),
        "seconds": rows[-1].get("seconds") if rows else None,
        # the weighted sum of the rewards on the held-out prompts
        "first_evaluation": first,
        "last_evaluation": last,
        "best_evaluation": max(known, default=None),
        "scores": {k: v for k, v in scores[-1].items() if k.startswith("eval/")} if scores else {},
        "images_per_second": median_speed(training),
        "modified": datetime.fromtimestamp(_modified(directory)).astimezone().isoformat(timespec="seconds"),
    }


def _table(found: Sequence[Mapping[str, Any]], top: Path, width: int) -> list[str]:
    """Lines no longer than ``width`` where that is possible: long names are cut, what they have reached is not."""
    rows = [_cells(run, top) for run in found]
    widths = {title: max(map(len, [title, *(row[title] for row in rows)])) for title in rows[0]}
    room = width - _GAP * (len(widths) - 1)
    while sum(widths.values()) > room and (wide := [name for name in _NAMES if widths[name] > _LEAST_NAME]):
        widths[max(wide, key=widths.__getitem__)] -= 1
    lines = [{title: title for title in widths}, *rows]
    return [_line(line, widths).rstrip() for line in lines]


def _line(cells: Mapping[str, str], widths: Mapping[str, int]) -> str:
    shown = []
    for title, text in cells.items():
        room = widths[title]
        # the end of a path says more than its beginning
        cut = f"…{text[len(text) - room + 1 :]}" if title == "run" else f"{text[: room - 1]}…"
        shown.append(text.ljust(room) if len(text) <= room else cut)
    return (" " * _GAP).join(shown)


def _cells(run: Mapping[str, Any], top: Path) -> dict[str, str]:
    path, speed, state = Path(run["run"]), run["images_per_second"], run["state"]
    of = f" {run['iteration']}" if state in (RUNNING, STOPPED, FAILED) else ""
    at = {RUNNING: f"{of}/{run['iterations'] or _UNKNOWN}", STOPPED: f" at{of}", FAILED: f" at{of}"}.get(state, "")
    numbers = [
        f"{value:.3f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.3g}"
        for value in (run["first_evaluation"], run["last_evaluation"])
        if value is not None
    ]
    return {
        "run": path.name if path == top else str(path.relative_to(top)),
        "recipe": run["recipe"] or _UNKNOWN,
        "model": run["model"] or _UNKNOWN,
        "reward": run["reward"] or _UNKNOWN,
        "evaluation": "→".join(numbers) or "-",
        "img/s": f"{speed:.3g}" if speed is not None else "-",
        "state": f"{state}{at}",
    }


def _config(path: Path) -> dict[str, Any]:
    try:
        plain = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (OSError, OmegaConfBaseException, YAMLError, ValueError, TypeError):
        return {}
    return {str(key): value for key, value in plain.items()} if isinstance(plain, dict) else {}


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        return read_rows(path, is_growing=True)
    except OSError:
        return []


def _of(config: Mapping[str, Any], group: str) -> Mapping[str, Any]:
    found = config.get(group)
    return found if isinstance(found, Mapping) else {}


def _recipe(config: Mapping[str, Any]) -> str | None:
    """Its name; of a run of an earlier version, which has none, the class of its objective."""
    if recipe := config.get("recipe"):
        return str(recipe)
    return _class_of(_of(_of(config, "algorithm"), "objective"))


def _model(config: Mapping[str, Any]) -> str | None:
    model = _of(config, "model")
    weights = str(model.get("weights") or "")
    if weights.startswith("pkg://fastgrpo.shapes"):
        return "shapes"
    if weights and weights != "random":
        return Path(weights.partition("@")[0]).name
    family = _class_of(model)
    return f"{family}, random" if family and weights else family


def _class_of(node: Mapping[str, Any]) -> str | None:
    target = str(node.get("_target_") or "")
    return target.rpartition(".")[2] or None


def _modified(directory: RunDirectory) -> float:
    times = [path.stat().st_mtime for path in (directory.metrics, directory.config, directory.path) if path.exists()]
    return times[0] if times else 0.0
