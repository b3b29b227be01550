"""One rank of a measured run, started by torchrun: trains by the overrides it is given and writes what it told.

torchrun --nproc-per-node 4 -m benchmarks.scaling.rank DIRECTORY [key=value ...]
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.scaling.measured import Counts, Measured, run
from fastgrpo.config import load_config
from fastgrpo.model_on_device import device_of
from fastgrpo.rewards.ranks import PolicyRank
from fastgrpo.runtime.distributed import join_world, leave_world
from fastgrpo.runtime.traffic import Collective
from fastgrpo.train import build_trainer


def main() -> None:
    directory, overrides = Path(sys.argv[1]), sys.argv[2:]
    config = load_config("train", overrides)
    world = join_world(device_of(config), config.distributed.timeout_seconds)
    measured = run(build_trainer(config, PolicyRank(world=world)))
    rows = {"iterations": [_rows(counts) for counts in measured.iterations], "between": _rows(measured.between)}
    (directory / f"rank_{world.rank}.json").write_text(json.dumps(rows))
    world.barrier("the end of the run")
    leave_world()


def read(path: Path) -> Measured:
    """What a rank wrote."""
    rows = json.loads(path.read_text())
    return Measured([_counts(part) for part in rows["iterations"]], _counts(rows["between"]))


def _rows(counts: Mapping[Collective, int]) -> list[dict[str, Any]]:
    return [{**asdict(one), "calls": count} for one, count in counts.items()]


def _counts(rows: list[dict[str, Any]]) -> Counts:
    found = Counts()
    for row in rows:
        calls = row.pop("calls")
        found[Collective(**{**row, "shapes": tuple(tuple(shape) for shape in row["shapes"])})] += calls
    return found


if __name__ == "__main__":
    main()
