"""Where a run's time went: seconds by stage over all iterations, and what else was written of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from fastgrpo.records.json_lines import read_rows
from fastgrpo.records.stragglers import report
from fastgrpo.report.run import Run, number

# in an iteration, and between iterations
_INSIDE = ("encode", "search", "rollout", "reward", "update")
_BETWEEN = ("evaluate", "checkpoint")
OTHER = "other"
COLORS = {
    "encode": "#94a3b8",
    "search": "#d55e00",
    "rollout": "#0072b2",
    "reward": "#e69f00",
    "update": "#009e73",
    OTHER: "#cbd5e1",
    "evaluate": "#56b4e9",
    "checkpoint": "#cc79a7",
}


@dataclass(frozen=True)
class Stage:
    """``seconds`` in all, their share of the whole, and the median over iterations that have the stage."""

    name: str
    seconds: float
    share: float
    median: float
    color: str


@dataclass(frozen=True)
class Times:
    """``total`` is of all stages; ``wait`` the part of them in which other ranks were waited for."""

    stages: list[Stage]
    total: float
    wait: float
    ranks: str
    profile: str


def times_of(run: Run) -> Times:
    """From the seconds in its rows."""
    by_stage: dict[str, list[float]] = {name: [] for name in COLORS}
    for row in run.rows:
        inside = {name: number(row.get(f"seconds/{name}")) for name in (*_INSIDE, *_BETWEEN)}
        for name, seconds in inside.items():
            if seconds is not None:
                by_stage[name].append(seconds)
        whole = number(row.get("seconds/iteration"))
        if whole is not None:
            by_stage[OTHER].append(max(0.0, whole - sum(inside[name] or 0.0 for name in _INSIDE)))
    total = sum(map(sum, by_stage.values()))
    return Times(
        stages=[_stage(name, seconds, total) for name, seconds in by_stage.items() if sum(seconds) > 0],
        total=total,
        wait=sum(number(row.get("seconds/wait")) or 0.0 for row in run.rows),
        ranks=_ranks(run),
        profile=_profile(run),
    )


def _stage(name: str, seconds: list[float], total: float) -> Stage:
    return Stage(name, sum(seconds), sum(seconds) / total, median(seconds), COLORS[name])


def _ranks(run: Run) -> str:
    """Which rank the others waited for, where there were several."""
    rows = read_rows(run.directory.ranks)
    # a resumed run may have had another number of ranks
    rows = [row for row in rows if _is_whole(row) and len(row["waited"]) == len(rows[-1].get("waited", ()))]
    return report(rows) if rows else ""


def _is_whole(row: Mapping[str, object]) -> bool:
    return {"own", "stages", "waited"} <= row.keys()


def _profile(run: Run) -> str:
    path = run.directory.path / "profile" / "table.md"
    return path.read_text(encoding="utf-8") if path.is_file() else ""
