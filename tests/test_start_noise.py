"""The search of start noises on a model: what it estimates candidates by, and in which iterations."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastgrpo.assembly import build_trainer
from fastgrpo.models.pipeline_model import PipelineModel
from fastgrpo.trainer import Trainer
from fastgrpo.types import Samples
from fastgrpo_kernels import combined, philox_normal
from tests.tiny_config import make_config

# SD3's shift of 3 on 1, 3/4, 1/2, 1/4: not SD3's own grid, whose last step would be all but empty
ESTIMATE_TIMES = (1.0, 0.9, 0.75, 0.5, 0.0)


def make_trainer(weights: Path, output: Path, *words: str) -> Trainer:
    return build_trainer(make_config(weights, output, "seed=5", "reward.golden=false", *words))


def test_a_searched_group_starts_from_the_candidate_whose_estimate_has_the_best_reward(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["algorithm/noise=elite", "algorithm.noise.start=mean", "algorithm.noise.project=best"]
    words += ["algorithm.noise.candidates=4", "algorithm.noise.elites=1", "algorithm.noise.mix=0.5"]
    trainer = make_trainer(tiny_weights, tmp_path / "run", *words, "train.prompts_per_iteration=4")
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
    is_searched_P = ~noise.estimates_PG.isnan().any(dim=1)
    # so that places among the searched are not those among all
    assert is_searched_P.tolist() == [False, True, True, False]
    shape = trainer.model.latent_shape
    start_PGCHW = noise.start_BCHW.unflatten(0, (4, 3))
    for p, (text, prompt_id) in enumerate(zip(samples.prompts.texts, samples.prompts.ids, strict=True)):
        stream, num = (1, 4) if is_searched_P[p] else (0, 3)
        drawn = philox_normal(5, stream, torch.tensor([prompt_id]), torch.arange(num), math.prod(shape))
        expected_GCHW = drawn.view(num, *shape)
        if is_searched_P[p]:
            scores_K = estimate(trainer, expected_GCHW, text)
            assert scores_K.sort().values.diff()[-1] > 1e-4
            expected_GCHW = expected_GCHW[scores_K.argmax()].expand(3, -1, -1, -1)
            torch.testing.assert_close(noise.estimates_PG[p], scores_K.max().expand(3), rtol=1e-4, atol=0)
        torch.testing.assert_close(start_PGCHW[p], expected_GCHW)


@torch.no_grad()
def estimate(trainer: Trainer, x_KCHW: Tensor, text: str) -> Tensor:
    """Rewards of the images that Euler's steps lead to."""
    conditions = trainer.model.encode([text] * len(x_KCHW))
    for t, t_next in pairwise(ESTIMATE_TIMES):
        x_KCHW = x_KCHW + (t_next - t) * combined(trainer.model.velocity(x_KCHW, t, conditions))
    scores = trainer.rewards.begin_search([text] * len(x_KCHW))
    scores.add(trainer.model.decode(x_KCHW))
    return scores.collect()


def test_the_last_iteration_of_a_run_is_annealed_and_its_first_ones_are_not(tiny_weights: Path, tmp_path: Path) -> None:
    words = ["algorithm/noise=elite", "algorithm.noise.anneal=0.0", "train.iterations=1000"]
    words += ["algorithm.noise.candidates=4", "algorithm.noise.elites=2", "algorithm.noise.estimate_steps=1"]
    trainer = make_trainer(tiny_weights, tmp_path / "run", *words)
    assert [trainer.step()["search/share"] for _ in range(2)] == [1.0, 1.0]
    trainer.iteration = 999
    assert trainer.step()["search/share"] == 0.0
