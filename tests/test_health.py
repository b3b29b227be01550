"""A run stops where rollout and update disagree by more than they may, and where gradients stay broken."""

import math
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fastgrpo.health import Health, TrainingError
from fastgrpo.types import TrainedSteps, Trajectories
from fastgrpo.update import UpdateStats

NOTHING = torch.zeros(0)
TRAJECTORIES = Trajectories(
    images_BCHW=torch.ones(2, 3, 1, 1),
    start_BCHW=NOTHING,
    trained=TrainedSteps((0,), NOTHING, NOTHING, torch.tensor([[-1.0, -2.0]]), NOTHING, NOTHING),
)


def stats(deviation: float | None = 0.0, skipped_steps: int = 0, max_deviation: float = 1e-5) -> UpdateStats:
    return UpdateStats(
        means={"loss": 0.0, "kl": 0.0, "approx_kl": 0.0, "clip_fraction": 0.0},
        deviation=deviation,
        deviation_name="ratio_deviation",
        max_deviation=max_deviation,
        num_terms=1,
        grad_norm=1.0,
        skipped_steps=skipped_steps,
        optimizer_steps=1,
        learning_rate=1e-4,
    )


def judge(health: Health, seen: UpdateStats, iteration: int = 7) -> None:
    health(iteration, seen, TRAJECTORIES, advantages_B=torch.tensor([1.0, -1.0]))


@pytest.mark.parametrize("limit", [1e-5, 1e-6, 0.1])
def test_what_rollout_and_update_compute_may_differ_by_its_limit(limit: float, tmp_path: Path) -> None:
    health = Health(failed_batch=tmp_path / "batch.safetensors")
    judge(health, stats(0.0, max_deviation=limit))
    judge(health, stats(0.99 * limit, max_deviation=limit))
    # in smaller batches, not compared, or of a share that was not learned from
    judge(health, stats(math.nan, max_deviation=limit))
    judge(health, stats(None, max_deviation=limit))
    judge(health, stats(0.5, skipped_steps=1, max_deviation=limit))
    assert not health.failed_batch.exists()
    why = rf"iteration 7: ratio_deviation is {1.01 * limit:.2g} before .* 0 within {limit:.2g}: rollout and update"
    with pytest.raises(TrainingError, match=why):
        judge(health, stats(1.01 * limit, max_deviation=limit))
    saved = safetensors.torch.load_file(health.failed_batch)
    assert torch.equal(saved["log_prob_TB"], torch.tensor([[-1.0, -2.0]]))
    assert torch.equal(saved["advantages_B"], torch.tensor([1.0, -1.0]))


def test_three_iterations_in_a_row_without_a_gradient_stop_the_run(tmp_path: Path) -> None:
    health = Health(failed_batch=tmp_path / "batch.safetensors")
    for skipped_steps in (1, 2, 0, 1, 1):
        judge(health, stats(skipped_steps=skipped_steps))
    with pytest.raises(TrainingError, match=r"3 iterations in a row had gradients that are not finite"):
        judge(health, stats(skipped_steps=1))
