"""Does a killed run end as an undisturbed one?  SIGKILL at random moments, resume, compare every number and weight.

    python -m benchmarks.kill_resume --kills 10

Every run is the command a user would type.  A run is killed and resumed until it is done; another is begun until there
were enough kills.  Compared with the undisturbed run: metrics.jsonl but for time and memory, and the bytes of weights,
averages and optimizer state.  Exits with 1 where one differs.
"""

import argparse
import random
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.report import table, write_report
from fastgrpo.metrics import read_metrics

VARYING = ("seconds", "images_per_second", "peak_bytes")
SETTINGS = (
    "train.iterations=12",
    "train.prompts_per_iteration=2",
    "train.group_size=4",
    "evaluate.every=5",
    "evaluate.images_per_prompt=1",
    "checkpoint.every=2",
    "runtime.threads=1",
)


@dataclass
class Kills:
    """Of one run: the last iteration whose metrics were written at each kill, and what then differed."""

    iterations: list[int] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="at least so many")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--out", type=Path, default=Path("outputs/kill_resume"), help="a new directory")
    parser.add_argument("overrides", nargs="*", help="further key=value for every run")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True)
    undisturbed = arguments.out / "undisturbed"
    started = time.monotonic()
    _wait(_start(undisturbed, arguments.overrides), undisturbed)
    seconds = time.monotonic() - started
    generator, runs = random.Random(arguments.seed), []
    while sum(len(run.iterations) for run in runs) < arguments.kills:
        output = arguments.out / f"killed_{len(runs)}"
        run = Kills(_kill_until_done(output, arguments.overrides, seconds, generator))
        run.differences = _differences(output, undisturbed)
        runs.append(run)
        print(f"{output.name}: killed after iterations {run.iterations}, differences: {run.differences or 'none'}")
    _report(runs, seconds, arguments)
    if any(run.differences for run in runs):
        sys.exit(1)


def _start(output: Path, overrides: list[str]) -> subprocess.Popen[bytes]:
    output.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "fastgrpo.train", *SETTINGS, *overrides, f"output={output}", "resume=true"]
    with open(output / "log.txt", "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def _wait(process: subprocess.Popen[bytes], output: Path) -> None:
    if process.wait() != 0:
        raise RuntimeError(f"a run ended with {process.returncode}; its words are in {output / 'log.txt'}")


def _kill_until_done(output: Path, overrides: list[str], seconds: float, generator: random.Random) -> list[int]:
    """The last iteration written at each kill; the moments are uniform over the time of an undisturbed run."""
    iterations: list[int] = []
    while True:
        process = _start(output, overrides)
        try:
            process.wait(timeout=generator.uniform(0.0, seconds))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            rows = read_metrics(output / "metrics.jsonl")
            iterations.append(rows[-1]["iteration"] if rows else -1)
        else:
            _wait(process, output)
            return iterations


def _differences(output: Path, undisturbed: Path) -> list[str]:
    """Names of what is not equal: a metric at an iteration, or a file of the last checkpoint."""
    ours, theirs = (_lasting(path) for path in (output, undisturbed))
    found = [
        f"iteration {key[0]}: {key[1]}"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    ]
    last = max((undisturbed / "checkpoints").glob("step_*"))
    for name in ("weights.safetensors", "ema.safetensors", "optimizer.safetensors"):
        path = output / "checkpoints" / last.name / name
        if not path.exists() or path.read_bytes() != (last / name).read_bytes():
            found.append(f"{last.name}/{name}")
    return found


def _lasting(output: Path) -> dict[tuple[int, str], Any]:
    rows = read_metrics(output / "metrics.jsonl")
    return {(r["iteration"], key): value for r in rows for key, value in r.items() if not key.startswith(VARYING)}


def _report(runs: list[Kills], seconds: float, arguments: argparse.Namespace) -> None:
    num_kills = sum(len(run.iterations) for run in runs)
    num_equal = sum(not run.differences for run in runs)
    rows = [
        [str(i), str(len(run.iterations)), ", ".join(map(str, run.iterations)), ", ".join(run.differences) or "none"]
        for i, run in enumerate(runs)
    ]
    body = (
        f"{num_kills} kills by SIGKILL at random moments of {len(runs)} runs (an undisturbed one takes {seconds:.0f} s "
        f"from its start); {num_equal} of {len(runs)} ended with the metrics and, bit for bit, the weights, averages "
        "and optimizer state of an undisturbed run.  -1: killed before the first line of metrics.\n\n"
        + table(["run", "kills", "last iteration written at each kill", "differences"], rows)
    )
    data = {
        "settings": [*SETTINGS, *arguments.overrides],
        "seed": arguments.seed,
        "kills": num_kills,
        "runs": [vars(run) for run in runs],
        "undisturbed_seconds": seconds,
    }
    print(write_report("kill_resume", title="Killed and resumed", body=body, data=data))


if __name__ == "__main__":
    main()
