"""Does a killed run end as an undisturbed one?  SIGKILL at random moments, resume, compare every number and weight.

    python -m benchmarks.kill_resume --kills 10

Every run is the command a user would type.  A run is killed and resumed some times and then left to its end; another is
begun until there were enough kills.  Compared with the undisturbed run: metrics.jsonl but for time and memory, and the
bytes of weights, averages and optimizer state.  Exits with 1 where one differs.
"""

import argparse
import random
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.lasting import different_metrics
from benchmarks.report import table, write_report
from fastgrpo.records.json_lines import read_rows

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


@dataclass(frozen=True)
class Pace:
    """Seconds to the first line of metrics, seconds from there to the end, and the iterations of an undisturbed run."""

    startup: float
    training: float
    iterations: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="at least so many")
    parser.add_argument("--kills-a-run", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--out", type=Path, default=Path("outputs/kill_resume"), help="a new directory")
    parser.add_argument("overrides", nargs="*", help="further key=value for every run")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True)
    undisturbed = arguments.out / "undisturbed"
    pace = _pace(undisturbed, arguments.overrides)
    generator = random.Random(arguments.seed)
    runs: list[Kills] = []
    while sum(len(run.iterations) for run in runs) < arguments.kills:
        output = arguments.out / f"killed_{len(runs)}"
        run = Kills(_kill(output, arguments, pace, generator))
        run.differences = _differences(output, undisturbed)
        runs.append(run)
        print(f"{output.name}: killed after iterations {run.iterations}, differences: {run.differences or 'none'}")
    _report(runs, pace, arguments)
    if any(run.differences for run in runs):
        sys.exit(1)


def _start(output: Path, overrides: list[str]) -> subprocess.Popen[bytes]:
    output.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "fastgrpo", "train", *SETTINGS, *overrides, f"output={output}", "resume=true"]
    with open(output / "log.txt", "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def _wait(process: subprocess.Popen[bytes], output: Path) -> None:
    if process.wait() != 0:
        raise RuntimeError(f"a run ended with {process.returncode}; its words are in {output / 'log.txt'}")


def _pace(output: Path, overrides: list[str]) -> Pace:
    """Of the undisturbed run."""
    started = time.monotonic()
    process = _start(output, overrides)
    while process.poll() is None and not _lines(output):
        time.sleep(0.05)
    startup = time.monotonic() - started
    _wait(process, output)
    return Pace(startup=startup, training=time.monotonic() - started - startup, iterations=_lines(output)[-1])


def _kill(output: Path, arguments: argparse.Namespace, pace: Pace, generator: random.Random) -> list[int]:
    """The last iteration written at each kill; the moments are uniform over what is left of the run."""
    killed: list[int] = []
    while len(killed) < arguments.kills_a_run:
        done = max([0, *_lines(output)])
        left = pace.startup + pace.training * (1 - done / pace.iterations)
        process = _start(output, arguments.overrides)
        try:
            process.wait(timeout=generator.uniform(0.5 * pace.startup, left))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed.append(max([-1, *_lines(output)]))
        else:
            # it was done before its moment came
            break
    _wait(_start(output, arguments.overrides), output)
    return killed


def _lines(output: Path) -> list[int]:
    """The iterations that have been written."""
    return [row["iteration"] for row in read_rows(output / "metrics.jsonl")]


def _differences(output: Path, undisturbed: Path) -> list[str]:
    """Names of what is not equal: a metric at an iteration, or a file of the last checkpoint."""
    found = different_metrics(output, undisturbed)
    last = max((undisturbed / "checkpoints").glob("step_*"))
    for name in ("weights.safetensors", "ema.safetensors", "optimizer.safetensors"):
        path = output / "checkpoints" / last.name / name
        if not path.exists() or path.read_bytes() != (last / name).read_bytes():
            found.append(f"{last.name}/{name}")
    return found


def _report(runs: list[Kills], pace: Pace, arguments: argparse.Namespace) -> None:
    num_kills = sum(len(run.iterations) for run in runs)
    num_equal = sum(not run.differences for run in runs)
    rows = [
        [str(i), str(len(run.iterations)), ", ".join(map(str, run.iterations)), ", ".join(run.differences) or "none"]
        for i, run in enumerate(runs)
    ]
    body = (
        f"{num_kills} kills by SIGKILL at random moments of {len(runs)} runs; an undisturbed one takes "
        f"{pace.startup:.0f} s to its first evaluation and {pace.training:.0f} s from there.  {num_equal} of the "
        f"{len(runs)} ended with the metrics and, bit for bit, the weights, averages and optimizer state of an "
        "undisturbed run.  -1: killed before the first line of metrics.\n\n"
        + table(["run", "kills", "last iteration written at each kill", "differences"], rows)
    )
    data = {
        "settings": [*SETTINGS, *arguments.overrides],
        "seed": arguments.seed,
        "kills": num_kills,
        "runs": [vars(run) for run in runs],
        "undisturbed_seconds": [pace.startup, pace.training],
    }
    print(write_report("kill_resume", title="Killed and resumed", body=body, data=data))


if __name__ == "__main__":
    main()
