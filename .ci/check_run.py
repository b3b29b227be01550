"""Check what a training run wrote: ``python .ci/check_run.py outputs/NAME``.

Every iteration must have a finite loss and reward, and where rollout and update are compared before its first optimizer
step they must agree: a ratio of exactly 1, or a velocity but for the rounding of merged adapters.
"""

import json
import math
import sys
from pathlib import Path

# the second in float32
_DEVIATIONS = {"ratio_deviation": 0.0, "velocity_deviation": 1e-3}
_FINITE = ("loss", "reward/total", "grad_norm")


def faults(directory: Path) -> list[str]:
    """What is wrong with the run in ``directory``, one line a fault."""
    metrics, summary, report = directory / "metrics.jsonl", directory / "summary.json", directory / "report.html"
    missing = [f"{path} was not written" for path in (metrics, summary, report) if not path.exists()]
    if missing:
        return missing
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    trained = [row for row in rows if "loss" in row]
    found = [] if trained else [f"{metrics} has no iteration with a loss"]
    if trained and not _DEVIATIONS.keys() & trained[0].keys():
        found.append(f"{metrics} does not say whether rollout and update agree")
    for row in trained:
        where = f"iteration {row.get('iteration')}"
        found += [
            f"{where}: {key} is {row[key]}, it must be at most {limit:g}"
            for key, limit in _DEVIATIONS.items()
            if key in row and not (row[key] is not None and row[key] <= limit)
        ]
        bad = [key for key in _FINITE if not math.isfinite(row.get(key, math.nan))]
        found += [f"{where}: {key} is {row.get(key)}" for key in bad]
    if not json.loads(summary.read_text()):
        found.append(f"{summary} is empty")
    return found


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python .ci/check_run.py outputs/NAME")
    found = faults(Path(sys.argv[1]))
    print("\n".join(found) or f"{sys.argv[1]} is sound")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
