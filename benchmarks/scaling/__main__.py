"""What ranks tell each other, measured and expected, and how far that scales, predicted.

    python -m benchmarks.scaling

Trains the embedded model on 1, 2 and 4 processes, joined by gloo, with adapters, with a noise search and with all
weights in three ways, counts every collective of every rank, and compares them with what sizes of weights and rows say.
From the same formulas it predicts the efficiency of SD3.5-medium and FLUX.1-dev on 8 to 1024 H100s.  Nothing here is
timed; ``benchmarks.scaling.timed`` is.  Exits with 1 where a byte or a call is not as expected.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.report import write_report
from benchmarks.scaling.cases import CASES, Case, expected, latent_bytes, load
from benchmarks.scaling.cluster import Cluster
from benchmarks.scaling.efficiency import Speed
from benchmarks.scaling.measured import Measured, Outcome, compare, largest_besides_weights
from benchmarks.scaling.rank import train_on_ranks
from benchmarks.scaling.tables import measured_part, predicted_part, predictions
from benchmarks.scaling.workload import workloads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/scaling"), help="a new directory")
    arguments = parser.parse_args()
    # threads would not outlive a fork
    torch.set_num_threads(1)
    outcomes = [_outcome(arguments.out, case, num_ranks) for case in CASES for num_ranks in case.num_ranks]
    cluster, speed, predicted = Cluster(), Speed(), workloads()
    body = measured_part(outcomes) + "\n\n" + predicted_part(predicted, cluster, speed)
    data = {
        "settings": {case.name: case.words for case in CASES},
        "runs": [asdict(outcome) for outcome in outcomes],
        "cluster": asdict(cluster),
        "speed": asdict(speed),
        "predictions": [asdict(one) for one in predictions(predicted, cluster, speed)],
    }
    print(write_report("scaling", title="What ranks tell each other, and how far that scales", body=body, data=data))
    if any(outcome.failures for outcome in outcomes):
        sys.exit(1)


def _outcome(out: Path, case: Case, num_ranks: int) -> Outcome:
    directory = out / f"{case.name}_{num_ranks}"
    directory.mkdir(parents=True)
    held_out = directory / "held_out.txt"
    held_out.write_text("a red circle\na blue square\n")
    words = [*case.words, f"prompts.held_out={held_out}", f"output={directory / 'run'}"]
    ranks = train_on_ranks(directory, num_ranks, words, case.per_node)
    config = load(case)
    lines = compare(expected(config, num_ranks, case.per_node), ranks[0].iterations[0])
    largest = largest_besides_weights(lines, num_ranks)
    failures = [f"{line}" for line in lines if not line.agrees] + _differences(ranks)
    if largest >= latent_bytes(config):
        failures.append(f"an exchange of {largest} bytes a rank could have carried a latent")
    between = [{**asdict(one), "calls": calls} for one, calls in ranks[0].between.items()]
    outcome = Outcome(case.name, num_ranks, lines, largest, between, failures)
    print(f"{case.name} on {num_ranks}: {'; '.join(failures) or 'as expected'}", flush=True)
    return outcome


def _differences(ranks: Sequence[Measured]) -> list[str]:
    """Where a rank or an iteration is not as the first one of the first: shapes, types, groups and calls."""
    first = ranks[0].iterations[0]
    return [
        f"rank {rank} told other things in iteration {place}"
        for rank, measured in enumerate(ranks)
        for place, counts in enumerate(measured.iterations)
        if counts != first
    ]


if __name__ == "__main__":
    main()
