"""A rank that is killed: the others end, and from the last checkpoint the run ends as an undisturbed one."""

import os
import random
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from omegaconf import DictConfig

from benchmarks.rank_faults import FAULTS, NUM_RANKS, Job, differences, disturb
from benchmarks.rounding import metric_differences
from fastgrpo.distributed.world import World
from tests.distributed.training import make_config, make_trainer, train
from tests.ranks import Ranks, ranks_of_module
from tests.tiny_config import make_overrides

NUM_ITERATIONS = 6
SETTINGS = ("train.learning_rate=1e-2", "checkpoint.every=2", "evaluate.every=3")

on_ranks = ranks_of_module()


def train_until_killed(world: World, config: DictConfig, output: Path) -> str:
    """The second rank is killed in the third iteration, before gradients are added up; what the first one raises."""
    trainer = make_trainer(world, config, output)
    add = World.sum_

    def die(*arguments: Any) -> None:
        if trainer.iteration == 2 and world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        add(*arguments)

    with mock.patch.object(World, "sum_", die), pytest.raises(RuntimeError) as raised:
        trainer.run()
    return f"{trainer.iteration} {world.waiting_in}: {raised.value}"


def test_a_run_of_two_ranks_of_which_one_is_killed_goes_on_from_its_last_checkpoint(
    tiny_weights: Path, tmp_path: Path, on_ranks: Ranks
) -> None:
    config = make_config(tiny_weights, *SETTINGS, "train.iterations=4")
    undisturbed = on_ranks(2, train, config, tmp_path / "undisturbed")[0]
    said, _ = on_ranks(2, train_until_killed, config, tmp_path / "killed", killed=[1])
    assert said.startswith("2 gradients: ")
    assert [path.name for path in (tmp_path / "killed/checkpoints").iterdir()] == ["step_000002"]
    resumed = on_ranks(2, train, config, tmp_path / "killed", resume=True)[0]
    assert set(metric_differences(undisturbed.rows[3:], resumed.rows).values()) == {0.0}
    assert all(torch.equal(weight, undisturbed.ended[name]) for name, weight in resumed.ended.items())


@pytest.mark.slow
def test_a_job_with_a_killed_rank_restarts_by_itself_and_ends_as_an_undisturbed_one(
    tiny_weights: Path, tmp_path: Path
) -> None:
    outputs = tmp_path / "undisturbed", tmp_path / "killed"
    words = (*SETTINGS, f"train.iterations={NUM_ITERATIONS}", "distributed.beat_seconds=0.2")
    undisturbed, killed = (Job(output, make_overrides(tiny_weights, output, *words)) for output in outputs)
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
