"""Evaluation starts from noise of its own: the same in every run, and never that of training."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastgrpo.algorithm.noise import NoiseDraw
from fastgrpo.memory.batches import BatchSizes
from fastgrpo.train import build_trainer
from fastgrpo_kernels import philox_normal
from tests.tiny_config import TEXTS, make_config


def test_all_batches_of_an_evaluation_have_one_shape_and_score_as_one_batch_does(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("evaluate.images_per_prompt=2", "reward.golden=false", "runtime.decode_batch=0")
    trainer = build_trainer(make_config(tiny_weights, tmp_path / "run", *words))
    shapes: set[int] = set()
    velocity, decode = trainer.model.velocity, trainer.model.decode

    def velocity_spy(x_BCHW: Tensor, *arguments):
        shapes.add(len(x_BCHW))
        return velocity(x_BCHW, *arguments)

    def decode_spy(x_BCHW: Tensor) -> Tensor:
        shapes.add(len(x_BCHW))
        return decode(x_BCHW)

    monkeypatch.setattr(trainer.model, "velocity", velocity_spy)
    monkeypatch.setattr(trainer.model, "decode", decode_spy)
    # ten images in batches of three and of one image in the last, of four and of two, and at once
    sizes = {size: BatchSizes.of(size) for size in (3, 4, 10)}
    scores = {}
    for size, batch_sizes in sizes.items():
        shapes.clear()
        scores[size] = replace(trainer.evaluation, batch_sizes=batch_sizes)().scores
        assert shapes == {size}
    for size in (3, 4):
        for name, score_PG in scores[size].items():
            torch.testing.assert_close(score_PG, scores[10][name], atol=1e-5, rtol=0)


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
