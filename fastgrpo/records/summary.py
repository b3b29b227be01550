"""The summary of a run: what it reached, how fast, and on what hardware, versions and commit."""

import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fastgrpo.records.evaluations import best, differences, evaluated, weights_of
from fastgrpo.records.remarks import remarks
from fastgrpo.records.state import reached

_PACKAGES = ("fastgrpo", "torch", "triton", "diffusers", "transformers", "peft", "numpy")


def summarize(
    rows: Sequence[dict[str, Any]],
    *,
    config: Mapping[str, Any] | None = None,
    evaluations: Sequence[Mapping[str, Any]] = (),
    error: str | None = None,
) -> dict[str, Any]:
    """What ``summary.json`` holds, from the rows of ``metrics.jsonl``; a quantity that was never measured is null.

    config: the run's, as plain data.  evaluations: the lines of evaluations.jsonl.  error: what ended the run early.
    """
    config = config or {}
    with_scores = evaluated(rows)
    winner = best(with_scores, weights_of(config))
    scores = [_evaluation(row) for row in with_scores]
    last = rows[-1] if rows else {}
    speeds = _column(rows, "images_per_second")
    return {
        "name": config.get("name"),
        "recipe": config.get("recipe"),
        "seed": config.get("seed"),
        "state": "failed" if error else reached(config, rows),
        "error": error,
        "iterations": last.get("iteration", 0),
        "images": last.get("images"),
        "seconds": last.get("seconds"),
        # the first iterations compile; the median does not see them
        "images_per_second": statistics.median(speeds) if speeds else None,
        "peak_bytes": max(_column(rows, "peak_bytes"), default=None),
        "skipped_steps": sum(_column(rows, "skipped_steps")),
        # why some of the iterations taught nothing
        "remarks": remarks(rows),
        "first_evaluation": scores[0] if scores else None,
        "last_evaluation": scores[-1] if scores else None,
        # by the weighted sum of the rewards, which is what is maximised
        "best_evaluation": _evaluation(winner) if winner else None,
        # of the last evaluation from the first, prompt by prompt
        "differences": differences(evaluations) if _begin_alike(evaluations, scores) else {},
        "hardware": hardware(),
        "versions": versions(),
        "commit": commit(),
    }


def hardware() -> dict[str, Any]:
    """The machine of this process."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "gpus": gpus,
        "cpu": processor(),
        "machine": platform.machine(),
        "cpu_cores": os.cpu_count(),
        "system": platform.platform(),
    }


def processor(info: Path = Path("/proc/cpuinfo")) -> str:
    """The model's name; on Linux with family and model number, since a virtual machine may cut the name short."""
    lines = info.read_text().splitlines() if info.exists() else []
    # the first processor's: a file has them all, one after another
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    if "model name" not in found:
        return platform.processor() or platform.machine()
    numbers = [f"{word} {found[key]}" for word, key in (("family", "cpu family"), ("model", "model")) if key in found]
    return f"{found['model name']} ({', '.join(numbers)})" if numbers else found["model name"]


def versions() -> dict[str, str | None]:
    """Python's and of each package that decides on speed or results; null for one that is not installed."""
    installed = {package: _version(package) for package in _PACKAGES}
    # torch itself also says for which CUDA it was built
    return {"python": platform.python_version()} | installed | {"torch": torch.__version__}


def commit() -> str | None:
    """The commit of the checkout that this package is imported from, "-dirty" if changed; null if it is not one."""
    here = Path(__file__)
    try:
        # a virtual environment may lie in a checkout of something else, which does not track this file
        _git(here.parent, "ls-files", "--error-unmatch", here.name)
        dirty = _git(here.parent, "status", "--porcelain", "--untracked-files=no")
        return _git(here.parent, "rev-parse", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(directory: Path, *arguments: str) -> str:
    command = ["git", "-C", str(directory), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _begin_alike(evaluations: Sequence[Mapping[str, Any]], scores: Sequence[Mapping[str, Any]]) -> bool:
    # a run of an earlier version kept none at first
    return bool(evaluations and scores) and evaluations[0]["iteration"] == scores[0]["iteration"]


def _evaluation(row: dict[str, Any]) -> dict[str, Any]:
    scores = {name: value for name, value in row.items() if name.startswith("eval/")}
    return {"iteration": row["iteration"], "seconds": row.get("seconds")} | scores


def _column(rows: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [row[name] for row in rows if row.get(name) is not None]
