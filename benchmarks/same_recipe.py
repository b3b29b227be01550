"""Is a run the same on 1, 2 and 4 processes, and when it is resumed on another number of them?

    python -m benchmarks.same_recipe

Each run is ``fastgrpo train`` on the embedded model under torchrun, 3 prompts x 5 samples an iteration, which neither 2
nor 4 divides.  Every line of metrics.jsonl, timings and memory aside, is compared with that of the run on one process.
Only the order of sums differs: in float64 the largest difference over 20 iterations must be below 1e-6, in float32 over
5 iterations below 1e-3.  Exits with 1 where that is not so.
"""

import argparse
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.lasting import VARYING
from benchmarks.report import table, write_report
from fastgrpo.records.json_lines import read_rows

SETTINGS = (
    "train.prompts_per_iteration=3",
    "train.group_size=5",
    "evaluate.images_per_prompt=1",
    "checkpoint.every=5",
    # also where a leg ends, which evaluates
    "evaluate.every=5",
    "runtime.threads=1",
    "runtime.micro_batch=4",
    "runtime.device=cpu",
)
FLOAT64 = ("model.dtype=float64", "model.decode_dtype=float64")
LORA = ("algorithm=flow_grpo", "train.optimizer_steps=2")
SEARCH = ("algorithm=smart_grpo", "algorithm.noise.candidates=6", "algorithm.noise.elites=3")
FULL = ("algorithm=flow_grpo", "adaptation=full", "train.learning_rate=1e-5")


@dataclass(frozen=True)
class Case:
    """Runs with the same ``overrides``: each a sequence of (ranks, iterations to end at), resumed from its second."""

    name: str
    overrides: tuple[str, ...]
    iterations: int
    tolerance: float
    runs: tuple[tuple[tuple[int, int], ...], ...]

    @classmethod
    def on_2_and_4(cls, name: str, overrides: tuple[str, ...], iterations: int = 20, tolerance: float = 1e-6) -> "Case":
        return cls(name, overrides, iterations, tolerance, (((2, iterations),), ((4, iterations),)))


RESUMED = ((4, 5), (1, 10), (2, 15), (4, 20))
CASES = (
    Case.on_2_and_4("LoRA, Flow-GRPO, 2 optimizer steps", (*LORA, *FLOAT64)),
    Case.on_2_and_4("LoRA, Smart-GRPO", (*SEARCH, *FLOAT64)),
    Case.on_2_and_4("full fine-tuning, gathered for the rollout", (*FULL, *FLOAT64)),
    Case.on_2_and_4(
        "full fine-tuning, sharded in the rollout", (*FULL, "adaptation.rollout_weights=sharded", *FLOAT64)
    ),
    Case("LoRA, saved on 4 and resumed on 1, 2 and 4", (*LORA, *FLOAT64), 20, 1e-6, (RESUMED,)),
    Case("full fine-tuning, saved on 4 and resumed on 1, 2 and 4", (*FULL, *FLOAT64), 20, 1e-6, (RESUMED,)),
    Case.on_2_and_4("LoRA, Smart-GRPO, float32", SEARCH, 5, 1e-3),
    Case.on_2_and_4("full fine-tuning, float32", FULL, 5, 1e-3),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    arguments = parser.parse_args()
    rows, data, ok = [], [], True
    for case in CASES:
        if arguments.only not in case.name:
            continue
        with tempfile.TemporaryDirectory() as directory:
            alone = train(Path(directory) / "alone", case.overrides, ((1, case.iterations),))
            for number, legs in enumerate(case.runs):
                found = train(Path(directory) / str(number), case.overrides, legs)
                key, difference = largest_difference(alone, found)
                ok &= difference <= case.tolerance
                processes = ", then ".join(str(ranks) for ranks, _ in legs)
                rows.append(
                    [case.name, processes, str(case.iterations), f"{difference:.1e}", key, f"{case.tolerance:g}"]
                )
                data.append(
                    {"case": case.name, "legs": legs, "difference": difference, "key": key, "overrides": case.overrides}
                )
                print(*rows[-1], sep=" | ", flush=True)
    header = ["run", "processes", "iterations", "largest difference", "in", "allowed"]
    body = f"{table(header, rows)}\n\nOf any number in metrics.jsonl but timings and memory, to the run on one process."
    write_report("same_recipe", title="The same run on several processes", body=body, data={"runs": data})
    sys.exit(not ok)


def train(output: Path, overrides: Sequence[str], legs: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """The metrics of a run that is stopped after each of its legs and resumed on another number of processes."""
    for number, (ranks, iterations) in enumerate(legs):
        settings = [*SETTINGS, *overrides, f"output={output}", f"train.iterations={iterations}"]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        python = [sys.executable] if ranks == 1 else command
        resume = [f"resume={'true' if number else 'false'}"]
        subprocess.run([*python, "-m", "fastgrpo.train", *settings, *resume], check=True, stdout=subprocess.DEVNULL)
    return read_rows(output / "metrics.jsonl")


def largest_difference(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> tuple[str, float]:
    """The key that differs most between two runs, and by how much; infinite where they do not have the same keys."""
    largest = ("nothing", 0.0)
    if [row["iteration"] for row in one] != [row["iteration"] for row in other]:
        return "iteration", math.inf
    for a, b in zip(one, other, strict=True):
        for key in a.keys() | b.keys():
            if key.startswith(VARYING):
                continue
            difference = _difference(a.get(key), b.get(key))
            if not difference <= largest[1]:
                largest = key, difference
    return largest


def _difference(a: Any, b: Any) -> float:
    if isinstance(a, int | float) and isinstance(b, int | float):
        return abs(a - b)
    return 0.0 if a == b else math.inf


if __name__ == "__main__":
    main()
