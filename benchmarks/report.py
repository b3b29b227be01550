"""Where a measurement goes: ``results/<theme>_<device>_<yyyymm>_<commit>``, .json and .md, with its origin.

BENCHMARK_RESULTS in the environment is another directory for it, BENCHMARK_COMMIT the commit where no git can be asked.
"""

import datetime
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from fastgrpo.records.summary import commit, hardware, versions

RESULTS = Path(os.environ.get("BENCHMARK_RESULTS") or Path(__file__).parent / "results")


def write_report(theme: str, *, title: str, body: str, data: dict[str, Any], counted: bool = False) -> Path:
    """Write .md and .json; ``body`` is Markdown, ``theme`` the module that measured, without ``benchmarks.``.

    counted: whether the device is a stand-in that computes nothing, so that nothing was measured on it.

    Returns the path of the .md.
    """
    revision = commit() or os.environ.get("BENCHMARK_COMMIT")
    if revision is None:
        raise ValueError(
            "a result needs the commit it was measured at; run benchmarks from a git checkout, or set BENCHMARK_COMMIT"
        )
    device = torch.cuda.get_device_name().replace(" ", "-").lower() if torch.cuda.is_available() else "cpu"
    device = "counted" if counted else device
    dirty = "-dirty" if revision.endswith("-dirty") else ""
    stem = f"{theme.replace('.', '_')}_{device}_{datetime.date.today():%Y%m}_{revision[:9]}{dirty}"
    machine = hardware()
    origin = {"commit": revision, "hardware": machine, "versions": versions()}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{stem}.json").write_text(json.dumps({"theme": theme, **origin, **data}, indent=1) + "\n")
    used = ", ".join(f"{name} {version}" for name, version in versions().items() if version)
    where = f"{machine['cpu_cores']} cores of {machine['cpu']}"
    where = where if device in ("cpu", "counted") else f"{device}, {where}"
    # where something lies on this machine says nothing on another one
    arguments = ["PATH" if Path(argument).is_absolute() else argument for argument in sys.argv[1:]]
    command = f"python -m benchmarks.{theme} {shlex.join(arguments)}".strip()
    body = f"{body.strip()}\n\nCommand: `{command}`"
    how = "Counted" if counted else "Measured"
    text = f"# {title}\n\n{body}\n\n{how} on {where}; commit {revision[:9]}{dirty}; {used}.\n"
    path = RESULTS / f"{stem}.md"
    path.write_text(text)
    return path


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
