"""torchrun with four ranks, one of them killed: the job restarts by itself and ends as an undisturbed one."""

import random
from pathlib import Path

from benchmarks.rank_faults import FAULTS, NUM_RANKS, Job, differences, disturb
from tests.tiny_config import make_overrides

NUM_ITERATIONS = 6
SETTINGS = (
    f"train.iterations={NUM_ITERATIONS}",
    "train.learning_rate=1e-2",
    "checkpoint.every=2",
    "evaluate.every=3",
    "distributed.beat_seconds=0.2",
)


def test_a_job_with_a_killed_rank_restarts_by_itself_and_ends_as_an_undisturbed_one(
    tiny_weights: Path, tmp_path: Path
) -> None:
    outputs = tmp_path / "undisturbed", tmp_path / "killed"
    undisturbed, killed = (Job(output, make_overrides(tiny_weights, output, *SETTINGS)) for output in outputs)
    kill = FAULTS[0]
    try:
        outcome = disturb(killed, kill, times=1, generator=random.Random(0), num_iterations=NUM_ITERATIONS)
        assert undisturbed.finish() == 0, undisturbed.said
    finally:
        for job in (undisturbed, killed):
            job.end()
    assert outcome.failures == [], killed.said
    ((rank, iteration),) = outcome.struck
    assert 0 <= rank < NUM_RANKS
    assert 0 < iteration < NUM_ITERATIONS
    assert undisturbed.iterations() == list(range(NUM_ITERATIONS + 1))
    assert differences(*outputs) == []
