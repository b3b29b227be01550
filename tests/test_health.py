"""A run stops where the ratio leaves a tenth of its clip range, and where gradients stay broken."""

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
    trained=TrainedSteps((0,), NOTHING, NOTHING, torch.tensor([[-1.0, -2.0]]), NOTHING),
)


def stats(ratio_deviation: float = 0.0, skipped_steps: int = 0) -> UpdateStats:
    return UpdateStats(
        loss=0.0,
        kl=0.0,
        approx_kl=0.0,
        ratio_deviation=ratio_deviation,
        clip_fraction=0.0,
        grad_norm=1.0,
        skipped_steps=skipped_steps,
    )


def judge(health: Health, seen: UpdateStats, iteration: int = 7) -> None:
    health(iteration, seen, TRAJECTORIES, advantages_B=torch.tensor([1.0, -1.0]))


@pytest.mark.parametrize("clip_range", [1e-4, 1e-5])
def test_the_ratio_may_leave_one_by_a_tenth_of_the_clip_range(clip_range: float, tmp_path: Path) -> None:
    health = Health(failed_batch=tmp_path / "batch.safetensors", clip_range=clip_range)
    judge(health, stats(0.0))
    judge(health, stats(0.099 * clip_range))
    # not compared, or of a share that was not learned from
    judge(health, stats(math.nan))
    judge(health, stats(0.5, skipped_steps=1))
    assert not health.failed_batch.exists()
    why = (
        rf"iteration 7: ratio_deviation is {0.101 * clip_range:.2g} before .* 1 within {0.1 * clip_range:.2g}, 0\.1 of"
    )
    with pytest.raises(TrainingError, match=why):
        judge(health, stats(0.101 * clip_range))
    saved = safetensors.torch.load_file(health.failed_batch)
    assert torch.equal(saved["log_prob_TB"], torch.tensor([[-1.0, -2.0]]))
    assert torch.equal(saved["advantages_B"], torch.tensor([1.0, -1.0]))


def test_three_iterations_in_a_row_without_a_gradient_stop_the_run(tmp_path: Path) -> None:
    health = Health(failed_batch=tmp_path / "batch.safetensors", clip_range=1e-4)
    for skipped_steps in (1, 2, 0, 1, 1):
        judge(health, stats(skipped_steps=skipped_steps))
    with pytest.raises(TrainingError, match=r"3 iterations in a row had gradients that are not finite"):
        judge(health, stats(skipped_steps=1))
