"""A run saves when, how many and how its config says."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch

from fastgrpo.assembly import build_trainer
from fastgrpo.checkpoints.checkpoint import Checkpoint
from fastgrpo.checkpoints.train_state import TrainState
from fastgrpo.evaluation import EvaluationResult
from fastgrpo.profiling.profile import Step
from fastgrpo.records.record import NoRecord
from fastgrpo.trainer import Trainer
from tests.tiny_config import make_config

SMALL = ("train.prompts_per_iteration=1", "train.group_size=2", "algorithm.schedule.num_steps=2", "evaluate.every=99")


def make_trainer(weights: Path, output: Path, *overrides: str) -> Trainer:
    trainer = build_trainer(make_config(weights, output, *SMALL, *overrides))
    # curves and pictures take longer than training
    trainer.record = NoRecord()
    return trainer


def test_a_run_saves_every_so_many_iterations_and_at_its_end_and_keeps_so_many(
    tiny_weights: Path, tmp_path: Path
) -> None:
    words = ("train.iterations=7", "checkpoint.every=2", "checkpoint.keep=3", "checkpoint.keep_best=false")
    trainer, save = make_trainer(tiny_weights, tmp_path / "run", *words), Checkpoint.save
    saved: list[int] = []

    def save_and_tell(checkpoint: Checkpoint, state: TrainState, best: int | None) -> Path:
        saved.append(state.iteration)
        return save(checkpoint, state, best)

    with mock.patch.object(Checkpoint, "save", save_and_tell):
        trainer.run()
    assert saved == [2, 4, 6, 7]
    kept = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert kept == ["step_000004", "step_000006", "step_000007"]


@pytest.mark.parametrize("keep_best", [True, False])
def test_the_checkpoint_of_the_best_evaluation_is_kept_and_known_after_a_resume(
    keep_best: bool, tiny_weights: Path, tmp_path: Path
) -> None:
    words = ["train.iterations=6", "evaluate.every=1", "checkpoint.every=4", "checkpoint.keep=1"]
    words.append(f"checkpoint.keep_best={str(keep_best).lower()}")
    trainer, save = make_trainer(tiny_weights, tmp_path / "run", *words), Checkpoint.save
    (reward,) = trainer.rewards.weights
    # by iteration; one that is equal to the best is no better
    totals, saved = [1.0, 2.0, 5.0, float("nan"), 5.0, 3.0, 4.0], list[int]()

    def evaluate() -> EvaluationResult:
        scores = {reward: torch.full((1, 1), totals[trainer.iteration])}
        means = {name: score_PG.item() for name, score_PG in scores.items()}
        return EvaluationResult(scores, means, 1, ["a red circle"], [torch.zeros(3, 32, 32)], None)

    def save_and_tell(checkpoint: Checkpoint, state: TrainState, best: int | None) -> Path:
        saved.append(state.iteration)
        return save(checkpoint, state, best)

    trainer.evaluation = evaluate  # type: ignore[assignment]
    with mock.patch.object(Checkpoint, "save", save_and_tell):
        trainer.run()
    assert saved == ([1, 2, 4, 6] if keep_best else [4, 6])
    kept = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert kept == (["step_000002", "step_000006"] if keep_best else ["step_000006"])
    trainer._best = None
    trainer.resume()
    assert trainer._best == (5.0, 2)


def save_and_look(stood: list[bool]) -> Callable[[Checkpoint, TrainState, int | None], Path]:
    """``Checkpoint.save``, and whether what it saved stands when it returns to training."""
    save = Checkpoint.save

    def run(checkpoint: Checkpoint, state: TrainState, best: int | None) -> Path:
        path = save(checkpoint, state, best)
        stood.append(path.exists())
        return path

    return run


def test_a_run_that_saves_at_once_trains_on_when_its_checkpoint_stands(tiny_weights: Path, tmp_path: Path) -> None:
    words = ("train.iterations=2", "checkpoint.every=1", "checkpoint.asynchronous=false")
    trainer, sync = make_trainer(tiny_weights, tmp_path / "run", *words), os.fsync
    stood: list[bool] = []

    def sync_slowly(descriptor: int) -> None:
        time.sleep(0.05)
        sync(descriptor)

    with mock.patch.object(os, "fsync", sync_slowly), mock.patch.object(Checkpoint, "save", save_and_look(stood)):
        trainer.run()
    assert stood == [True, True]


def test_a_run_that_saves_asynchronously_trains_on_beside_the_writing(tiny_weights: Path, tmp_path: Path) -> None:
    words = ("train.iterations=2", "checkpoint.every=1", "checkpoint.asynchronous=true")
    trainer, sync = make_trainer(tiny_weights, tmp_path / "run", *words), os.fsync
    stood: list[bool] = []
    has_trained = threading.Event()

    def sync_when_trained(descriptor: int) -> None:
        assert has_trained.wait(60)
        sync(descriptor)

    def step_and_tell(step: Step) -> dict[str, float]:
        measured = step()
        if trainer.iteration == 2:
            has_trained.set()
        return measured

    trainer.profile = step_and_tell
    with mock.patch.object(os, "fsync", sync_when_trained), mock.patch.object(Checkpoint, "save", save_and_look(stood)):
        trainer.run()
    assert stood[0] is False
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["step_000001", "step_000002"]
