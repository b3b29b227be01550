"""The search of start noises on a model: what it estimates candidates by, and in which iterations."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastgrpo.models.pipeline_model import PipelineModel
from fastgrpo.train import build_trainer
from fastgrpo.trainer import Trainer
from fastgrpo.types import Samples
from fastgrpo_kernels import philox_normal
from tests.tiny_config import make_config

# SD3's shift of 3 on 1, 3/4, 1/2, 1/4: not SD3's own grid, whose last step would be all but empty
ESTIMATE_TIMES = (1.0, 0.9, 0.75, 0.5, 0.0)


def make_trainer(weights: Path, output: Path, *words: str) -> Trainer:
    return build_trainer(make_config(weights, output, "seed=5", "reward.golden=false", *words))


def test_a_group_starts_from_the_candidate_whose_estimate_has_the_best_reward(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("algorithm/noise=best_of_k", "algorithm.noise.start=shared", "algorithm.noise.candidates=4")
    trainer = make_trainer(tiny_weights, tmp_path / "run", *words)
    times: list[float] = []
    run = PipelineModel._run

    def spy(self, transformer, t: float, *arguments):
        times.append(t)
        return run(self, transformer, t, *arguments)

    samples = Samples.all_of(trainer.prompts.at(0), group_size=3)
    with monkeypatch.context() as patch:
        patch.setattr(PipelineModel, "_run", spy)
        noise = trainer.start_noise(samples)
    assert sorted(set(times), reverse=True) == pytest.approx(ESTIMATE_TIMES[:-1])
    assert noise.estimates_PG is not None
    shape = trainer.model.latent_shape
    for p, (text, prompt_id) in enumerate(zip(samples.prompts.texts, samples.prompts.ids, strict=True)):
        drawn = philox_normal(5, 1, torch.tensor([prompt_id]), torch.arange(4), math.prod(shape))
        candidates_KCHW = drawn.view(4, *shape)
        scores_K = estimate(trainer, candidates_KCHW, text)
        best = int(scores_K.argmax())
        assert scores_K.sort().values.diff()[-1] > 1e-4
        for start_CHW in noise.start_BCHW.unflatten(0, (2, 3))[p]:
            torch.testing.assert_close(start_CHW, candidates_KCHW[best])
        torch.testing.assert_close(noise.estimates_PG[p], scores_K[best].expand(3), rtol=1e-3, atol=0)


@torch.no_grad()
def estimate(trainer: Trainer, x_KCHW: Tensor, text: str) -> Tensor:
    """Rewards of the images that Euler's steps lead to."""
    conditions = trainer.model.encode([text] * len(x_KCHW))
    for t, t_next in pairwise(ESTIMATE_TIMES):
        x_KCHW = x_KCHW + (t_next - t) * trainer.model.velocity(x_KCHW, t, conditions)
    scores = trainer.rewards.begin_search([text] * len(x_KCHW))
    scores.add(trainer.model.decode(x_KCHW))
    return scores.collect()


def test_the_last_of_some_iterations_is_annealed_and_the_first_is_not(tiny_weights: Path, tmp_path: Path) -> None:
    words = ("algorithm/noise=elite", "algorithm.noise.anneal=0.0", "train.iterations=3")
    words += ("algorithm.noise.candidates=4", "algorithm.noise.elites=2", "algorithm.noise.estimate_steps=1")
    trainer = make_trainer(tiny_weights, tmp_path / "run", *words)
    first, _, last = (trainer.step()["search/share"] for _ in range(3))
    assert (first, last) == (1.0, 0.0)
