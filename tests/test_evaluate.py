"""Evaluation starts from noise of its own: the same in every run, and never that of training."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastgrpo.algorithm.noise import NoiseDraw
from fastgrpo.train import build_trainer
from fastgrpo_kernels import philox_normal
from tests.tiny_config import TEXTS, make_config


def test_evaluation_starts_from_its_own_stream_whatever_the_runs_seed(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("seed=7", "evaluate.images_per_prompt=2", "reward.golden=false")
    trainer = build_trainer(make_config(tiny_weights, tmp_path / "run", *words))
    starts: list[Tensor] = []
    velocity = trainer.model.velocity

    def spy(x_BCHW: Tensor, t: float, *arguments):
        if t == 1.0:
            starts.append(x_BCHW.clone())
        return velocity(x_BCHW, t, *arguments)

    monkeypatch.setattr(trainer.model, "velocity", spy)
    trainer.evaluation()
    prompts, places = torch.arange(len(TEXTS)), torch.arange(2)
    shape = trainer.model.latent_shape
    # the stream is part of what an evaluation is: figures of two versions can be compared
    expected = philox_normal(0, 3000, prompts, places, math.prod(shape)).view(10, *shape)
    # the last batch of four is filled up
    assert torch.equal(torch.cat(starts)[:10], expected)
    # start noise, a search, two steps and its decisions
    draw = NoiseDraw(7, prompts.tolist(), 2, shape)
    for stream in (0, 1, 2, 1000, 1001, 2000):
        assert not torch.equal(draw.starts(stream), expected)
