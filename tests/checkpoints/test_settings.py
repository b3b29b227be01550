"""A run saves when, how many and how its config says."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from fastgrpo.checkpoints.checkpoint import Checkpoint
from fastgrpo.checkpoints.train_state import TrainState
from fastgrpo.profiling.profile import Step
from fastgrpo.records.record import NoRecord
from fastgrpo.trainer import Trainer
from fastgrpo.training import build_trainer
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
    words = ("train.iterations=7", "checkpoint.every=2", "checkpoint.keep=3")
    trainer, save = make_trainer(tiny_weights, tmp_path / "run", *words), Checkpoint.save
    saved: list[int] = []

    def save_and_tell(checkpoint: Checkpoint, state: TrainState) -> Path:
        saved.append(state.iteration)
        return save(checkpoint, state)

    with mock.patch.object(Checkpoint, "save", save_and_tell):
        trainer.run()
    assert saved == [2, 4, 6, 7]
    kept = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert kept == ["step_000004", "step_000006", "step_000007"]


def save_and_look(stood: list[bool]) -> Callable[[Checkpoint, TrainState], Path]:
    """``Checkpoint.save``, and whether what it saved stands when it returns to training."""
    save = Checkpoint.save

    def run(checkpoint: Checkpoint, state: TrainState) -> Path:
        path = save(checkpoint, state)
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
