"""Images per second of real runs on more and more ranks: what the scaling model predicts, timed.

    python -m benchmarks.scaling.timed --ranks 1 2 4 8 model=sd35_medium experiment=flow_grpo_sd35
    python -m benchmarks.scaling.timed --ranks 8 16 32 --launch "srun -n {ranks} --ntasks-per-node 8 fastgrpo train" ...

Weak: every rank has as many prompts as the first number of ranks gives it; strong: all share what that number has.  A
round runs every case once, so that what changes on the machine meets all of them.  Efficiency is images per second and
rank, over that of the first number of ranks in the same round; the first iteration, which compiles, is left out.
"""

import argparse
import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median

import torch

from benchmarks.report import table, write_report
from fastgrpo.config import load_config
from fastgrpo.records.json_lines import read_rows

HEADER = ["scaling", "ranks", "images an iteration", "efficiency", "of the rounds", "waited for others"]
LAUNCH = "torchrun --standalone --nproc-per-node {ranks} -m fastgrpo train"


@dataclass(frozen=True)
class Case:
    scaling: str
    ranks: int
    prompts: int


@dataclass(frozen=True)
class Timed:
    """Medians over the iterations of one run; ``waited`` is the share of its seconds that the mean rank waited."""

    images: int
    images_per_second: float
    waited: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="the first is what others are compared to")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=4, help="of each run, after the first")
    parser.add_argument("--launch", default=LAUNCH, help="how so many ranks are started")
    parser.add_argument("overrides", nargs="*", help="key=value for every run")
    arguments = parser.parse_args()
    overrides = arguments.overrides
    if not torch.cuda.is_available():
        # a rank that has all cores to itself would leave nothing to gain
        overrides = ["runtime.threads=1", "runtime.device=cpu", *overrides]
        if max(arguments.ranks) > (os.cpu_count() or 1):
            parser.error(f"--ranks {max(arguments.ranks)} needs as many cores or GPUs")
    cases = cases_of(arguments.ranks, load_config("train", overrides).train.prompts_per_iteration)
    rounds: list[dict[Case, Timed]] = []
    for number in range(arguments.rounds):
        rounds.append({})
        for case in cases:
            rounds[-1][case] = run(case, arguments.launch, arguments.iterations, overrides)
            print(number, case, rounds[-1][case], flush=True)
    seen = {case: [found[case] for found in rounds] for case in cases}
    body = table(HEADER, [row(case, seen[case], efficiencies(case, cases[0], rounds)) for case in cases])
    if torch.cuda.is_available():
        first = median(timed.images_per_second for timed in seen[cases[0]])
        body += f"\n\n{cases[0].ranks} ranks made {first:.3f} images/s."
    body += f"\n\nOf {arguments.rounds} rounds, medians of {arguments.iterations} iterations each."
    data = {
        "overrides": overrides,
        "launch": arguments.launch,
        "cases": [asdict(case) | {"rounds": [asdict(timed) for timed in seen[case]]} for case in cases],
    }
    print(write_report("scaling.timed", title="Images per second on more ranks", body=body, data=data))


def row(case: Case, seen: Sequence[Timed], efficiency: Sequence[float]) -> list[str]:
    return [
        case.scaling,
        str(case.ranks),
        str(seen[0].images),
        f"{median(efficiency):.0%}",
        ", ".join(f"{one:.0%}" for one in efficiency),
        f"{median(timed.waited for timed in seen):.1%}",
    ]


def cases_of(ranks: Sequence[int], prompts: int) -> list[Case]:
    """The first number of ranks once, then each of the others with as many prompts a rank, and with as many in all."""
    weak = [Case("weak", more, prompts * more // ranks[0]) for more in ranks[1:]]
    strong = [Case("strong", more, prompts) for more in ranks[1:]]
    return [Case("first", ranks[0], prompts), *weak, *strong]


def efficiencies(case: Case, first: Case, rounds: Sequence[dict[Case, Timed]]) -> list[float]:
    """Of each round: images per second and rank, over those of the first case."""
    return [
        found[case].images_per_second / case.ranks / (found[first].images_per_second / first.ranks) for found in rounds
    ]


def run(case: Case, launch: str, iterations: int, overrides: Sequence[str]) -> Timed:
    """One run from its start."""
    with tempfile.TemporaryDirectory(dir=".") as directory:
        output = Path(directory).absolute() / "run"
        settings = [
            f"output={output}",
            f"train.iterations={iterations + 1}",
            f"train.prompts_per_iteration={case.prompts}",
            f"evaluate.every={iterations + 1}",
            "evaluate.images_per_prompt=1",
            f"checkpoint.every={iterations + 1}",
        ]
        command = [*shlex.split(launch.format(ranks=case.ranks)), *overrides, *settings]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        rows = read_rows(output / "metrics.jsonl")[2:]
        shares = [fmean(row["waited"]) for row in read_rows(output / "ranks.jsonl")[1:]] if case.ranks > 1 else [0.0]
        images = [row["images"] for row in rows]
        return Timed(
            images=images[1] - images[0],
            images_per_second=median(row["images_per_second"] for row in rows),
            waited=median(shares) / median(row["seconds/iteration"] for row in rows),
        )


if __name__ == "__main__":
    main()
