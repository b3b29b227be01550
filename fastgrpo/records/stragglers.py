"""Which rank the others wait for: ``ranks.jsonl``, a warning while it happens, and a table at the end of a run.

Each rank's seconds are its own: what it spent waiting for others in exchanges is taken out and told apart, since in an
iteration that ends for all at once only waiting differs.  Letters: R ranks.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from fastgrpo.records.json_lines import append_row, read_rows, truncate_rows

# a rank that is slower than the median by this share, so many iterations in a row, is warned of
SLOWER_BY = 0.2
IN_A_ROW = 3
_HEADING = "seconds an iteration"

_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Stragglers:
    """The writer of ``ranks.jsonl``, in one process of a run; ``hosts[r]`` is where rank r runs."""

    path: Path
    hosts: Sequence[str]
    _slowest: list[int] = field(default_factory=list, init=False)

    def add(self, iteration: int, seconds: Mapping[str, Sequence[float]], waited_R: Sequence[float]) -> None:
        """Write an iteration: own seconds of each rank by stage, and seconds that each waited for the others."""
        row = iteration_row(iteration, seconds, waited_R, self.hosts)
        append_row(self.path, row)
        self._warn(row)

    def truncate_to(self, iteration: int) -> None:
        """On resume from ``iteration``: drop later lines."""
        truncate_rows(self.path, iteration)

    def table(self) -> str:
        """A line a stage, over the iterations on so many ranks; empty where there are none, or one rank."""
        # a resumed run may have had another number of ranks
        rows = [row for row in read_rows(self.path) if len(row["waited"]) == len(self.hosts)]
        return report(rows) if rows and len(self.hosts) > 1 else ""

    def _warn(self, row: Mapping[str, Any]) -> None:
        total = row["own"]
        is_slow = total["slowest"] > (1 + SLOWER_BY) * total["median"]
        if not is_slow or total["rank"] not in self._slowest:
            self._slowest.clear()
        if is_slow:
            self._slowest.append(total["rank"])
        # again after as many more, lest a bad night is one line in a long log
        if len(self._slowest) == IN_A_ROW:
            self._slowest.clear()
            _log.warning(
                "rank %d on %s was slowest in the last %d iterations, in iteration %d by %.0f%% (%.2f s, median "
                "%.2f s): the others waited for it",
                total["rank"],
                total["host"],
                IN_A_ROW,
                row["iteration"],
                100 * (total["slowest"] / total["median"] - 1),
                total["slowest"],
                total["median"],
            )


def iteration_row(
    iteration: int, seconds: Mapping[str, Sequence[float]], waited_R: Sequence[float], hosts: Sequence[str]
) -> dict[str, Any]:
    """One line of ``ranks.jsonl``: per stage, and for all of them as ``own``, the median rank and the slowest."""
    own_R = [sum(stage_R[rank] for stage_R in seconds.values()) for rank in range(len(hosts))]
    return {
        "iteration": iteration,
        "own": _compared(own_R, hosts),
        "stages": {stage: _compared(stage_R, hosts) for stage, stage_R in seconds.items()},
        "waited": [round(value, 6) for value in waited_R],
    }


def report(rows: Sequence[Mapping[str, Any]]) -> str:
    """Per stage: mean seconds of the median and of the slowest rank, and which rank that was, how often.

    Below it how long a rank waits for the others, and which one waits least: it is the one that they wait for.
    """
    parts = {stage: [row["stages"][stage] for row in rows if stage in row["stages"]] for stage in _stages(rows)}
    parts["all stages"] = [row["own"] for row in rows]
    width = max(len(_HEADING), *map(len, parts))
    lines = [f"{_HEADING:<{width}}   median  slowest  slowest most often"]
    lines += [f"{stage:<{width}} {_line(found)}" for stage, found in parts.items()]
    waited_R = [fmean(waits) for waits in zip(*(row["waited"] for row in rows), strict=True)]
    least = min(range(len(waited_R)), key=waited_R.__getitem__)
    lines.append(
        f"waiting for others: {median(waited_R):.2f} s an iteration in the median, {max(waited_R):.2f} s at most; "
        f"rank {least} waits least, {waited_R[least]:.2f} s"
    )
    return "\n".join(lines)


def _compared(seconds_R: Sequence[float], hosts: Sequence[str]) -> dict[str, Any]:
    slowest = max(range(len(hosts)), key=seconds_R.__getitem__)
    return {
        "median": round(median(seconds_R), 6),
        "slowest": round(seconds_R[slowest], 6),
        "rank": slowest,
        "host": hosts[slowest],
    }


def _stages(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    # stages may come and go, as evaluation does
    return list(dict.fromkeys(stage for row in rows for stage in row["stages"]))


def _line(found: Sequence[Mapping[str, Any]]) -> str:
    ranks = [(entry["rank"], entry["host"]) for entry in found]
    (rank, host), times = max(((who, ranks.count(who)) for who in dict.fromkeys(ranks)), key=lambda pair: pair[1])
    medians, slowest = (fmean(entry[key] for entry in found) for key in ("median", "slowest"))
    return f"{medians:8.2f} {slowest:8.2f}  rank {rank} on {host}, {times} of {len(found)} times"
