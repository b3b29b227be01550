"""Many iterations leave no more tensors alive than a few do."""

import gc
from pathlib import Path

import pytest
import torch

from fastgrpo.assembly import build_trainer
from fastgrpo.trainer import Trainer
from tests.tiny_config import make_config

# five prompts are two an iteration, and what is kept of each is kept by then
WARM_UP, ITERATIONS = 4, 5


def live_bytes() -> int:
    """Of all tensors that Python knows, each storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def make_trainer(weights: Path, output: Path, device: str) -> Trainer:
    # with kl, guidance and several optimizer steps every part of an iteration runs
    return build_trainer(
        make_config(
            weights,
            output,
            "model.guidance_scale=4.5",
            "algorithm.objective.kl_coef=0.04",
            "train.optimizer_steps=2",
            "algorithm.schedule.num_steps=3",
            f"runtime.device={device}",
        )
    )


def test_later_iterations_keep_no_more_tensors_than_the_first(tiny_weights: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_weights, tmp_path / "run", "cpu")
    for _ in range(WARM_UP):
        trainer.step()
    before = live_bytes()
    for _ in range(ITERATIONS):
        trainer.step()
    assert live_bytes() == before > 0


@pytest.mark.gpu
def test_later_iterations_allocate_no_more_than_the_first(tiny_weights: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_weights, tmp_path / "run", "cuda")
    peaks = []
    for iterations in (WARM_UP, ITERATIONS):
        torch.cuda.reset_peak_memory_stats()
        for _ in range(iterations):
            trainer.step()
        gc.collect()
        peaks.append((torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()))
    assert peaks[1] == peaks[0]
