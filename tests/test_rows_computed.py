"""How many rows pass through the network in an iteration, against numbers by hand: nothing is computed twice.

Letters: B samples, T trained steps of N.  Flow-GRPO's recipe has T = N - 1; with guidance it takes
    rollout    2 N B                              both branches, the conditional one of T B in the mode of the update
    update     T B under gradient: the conditional branch
               T B of the unconditional branch, but not before the first optimizer step, where it is the rollout's
               2 T B of the reference policy where kl_coef > 0
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch

from fastgrpo.assembly import build_trainer
from fastgrpo.models.pipeline_model import PipelineModel
from fastgrpo.update import Update
from tests.tiny_config import make_config

B, N, T = 4, 7, 6
GUIDED = ("model.guidance_scale=4.5", "algorithm=flow_grpo", "algorithm.schedule.num_steps=7")
FAST = ("algorithm=flow_grpo_fast", "algorithm.schedule.num_steps=7")
# 3 of the 6 steps that may be trained, with 2 before and 2 after them
LATE_WINDOW = ("algorithm.timesteps.low=2", "algorithm.timesteps.high=5")


@dataclass
class Rows:
    """Rows of the networks' batches, in the mode of gradients, in which update computes, and without."""

    with_gradient: int = 0
    without: int = 0


Iterate = Callable[..., tuple[Rows, Rows]]


@pytest.fixture
def iterate(tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterate:
    return partial(count_rows, tiny_weights, tmp_path / "run", monkeypatch)


def count_rows(weights: Path, output: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> tuple[Rows, Rows]:
    """The rows of one iteration of 2 prompts x 2 samples: of the rollout with its search, and of the update."""
    recipe = ("train.group_size=2", "runtime.micro_batch=2", "reward.golden=false", *overrides)
    trainer = build_trainer(make_config(weights, output, *recipe))
    sampled, updated = Rows(), Rows()
    counts = sampled
    run, update = PipelineModel._run, Update.__call__

    def counting_run(self, transformer, t, x_BCHW, conditions):
        if torch.is_grad_enabled():
            counts.with_gradient += len(x_BCHW)
        else:
            counts.without += len(x_BCHW)
        return run(self, transformer, t, x_BCHW, conditions)

    def counting_update(self, *args, **kwargs):
        nonlocal counts
        counts = updated
        return update(self, *args, **kwargs)

    monkeypatch.setattr(PipelineModel, "_run", counting_run)
    monkeypatch.setattr(Update, "__call__", counting_update)
    assert trainer.step()["ratio_deviation"] == 0.0
    return sampled, updated


@pytest.mark.parametrize(
    ("optimizer_steps", "kl_coef", "without_gradient"),
    [
        # the reference policy's two branches; the unconditional one comes from the rollout
        (1, 0.04, 2 * T * B),
        # and for the second half of the samples the policy's own, which has moved
        (2, 0.04, 2 * T * B + T * B // 2),
        (4, 0.0, T * B * 3 // 4),
    ],
)
def test_the_full_recipe(optimizer_steps: int, kl_coef: float, without_gradient: int, iterate: Iterate) -> None:
    sampled, updated = iterate(
        *GUIDED,
        f"train.optimizer_steps={optimizer_steps}", f"algorithm.objective.kl_coef={kl_coef}",
    )  # fmt: skip
    assert sampled == Rows(with_gradient=T * B, without=2 * N * B - T * B)
    assert updated == Rows(with_gradient=T * B, without=without_gradient)


def test_the_fast_recipe_without_guidance(iterate: Iterate) -> None:
    sampled, updated = iterate(*FAST, "train.optimizer_steps=2")
    # a window of 3 is trained, whose replay is all that the update computes
    assert sampled == Rows(with_gradient=3 * B, without=N * B - 3 * B)
    assert updated == Rows(with_gradient=3 * B, without=0)


def test_gradients_taken_in_the_rollout_leave_the_update_nothing_to_compute(iterate: Iterate) -> None:
    sampled, updated = iterate(*FAST, "model.guidance_scale=4.5", "train.gradients=reweight")
    # both branches of all steps, the conditional ones of the window under gradient
    assert sampled == Rows(with_gradient=3 * B, without=2 * N * B - 3 * B)
    assert updated == Rows()


def test_with_two_optimizer_steps_half_of_the_gradients_are_taken_in_the_rollout(iterate: Iterate) -> None:
    sampled, updated = iterate(*FAST, "train.gradients=reweight", "train.optimizer_steps=2")
    assert sampled == Rows(with_gradient=3 * B, without=N * B - 3 * B)
    assert updated == Rows(with_gradient=3 * B // 2, without=0)


def test_a_shared_start_is_denoised_once_a_prompt_until_the_window(iterate: Iterate) -> None:
    sampled, updated = iterate(*FAST, *LATE_WINDOW, "algorithm/noise=shared")
    # steps 0 and 1 of two prompts, 2 to 6 of all samples
    assert sampled == Rows(with_gradient=3 * B, without=2 * 2 + 2 * B)
    assert updated == Rows(with_gradient=3 * B, without=0)


@pytest.mark.parametrize(
    ("solver", "rows"),
    [
        # prefix of 2 steps, window of 3, rest of 2, with guidance 2 B rows a step: 1 step, 3, 1 step
        ("solver=adams_bashforth", 2 * (1 + 3 + 1) * B),
        # the unconditional branch on 1 of 2 and 1 of 2 steps
        ("solver=cached_guidance", 2 * N * B - (1 + 1) * B),
    ],
)
def test_a_lossy_solver_saves_rows_outside_of_the_window_alone(solver: str, rows: int, iterate: Iterate) -> None:
    sampled, updated = iterate(*FAST, *LATE_WINDOW, "model.guidance_scale=4.5", solver)
    assert sampled == Rows(with_gradient=3 * B, without=rows - 3 * B)
    assert updated == Rows(with_gradient=3 * B, without=0)
