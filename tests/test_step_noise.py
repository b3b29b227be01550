"""The search of a step's noise on a model: what it estimates by, what is stored, and what is learned from it."""

import math
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.rounding import beyond_rounding, differences
from benchmarks.same_recipe import contrast
from fastgrpo.algorithm.algorithm import Algorithm
from fastgrpo.assembly import build_trainer
from fastgrpo.distributed.world import World
from fastgrpo.memory.batches import BatchSizes
from fastgrpo.models.pipeline_model import PipelineModel
from fastgrpo.parts import RunParts
from fastgrpo.rewards.weighted_sum import Rewards
from fastgrpo.rollout import StepRollout
from fastgrpo.step_noise import StepNoise
from fastgrpo.trainer import Trainer
from fastgrpo.types import ChosenNoise, Prompt, Samples, TrainedSteps, Trajectories
from fastgrpo.update import Update
from fastgrpo_kernels import combined, philox_normal
from tests.distributed.training import make_config, train
from tests.ranks import Ranks, ranks_of_module
from tests.test_update import (
    ADVANTAGES,
    OBJECTIVE,
    STEPS,
    Iteration,
    Recorder,
    apply,
    assert_same_gradients,
    expected_terms,
    gradients_of,
    make_iteration,
)
from tests.tiny_config import make_config as tiny

SEED, GROUP_SIZE = 5, 3
# two stochastic steps of five, after one that is not
WINDOW: tuple[str, ...] = ("algorithm.schedule.num_steps=5", "algorithm/timesteps=random_window")
WINDOW += ("algorithm.timesteps.size=2", "algorithm.timesteps.low=1", "algorithm.timesteps.high=3")
# a reward that follows rounding, where the bytes of a JPEG would jump
REWARD = ("reward=custom", "reward.path=benchmarks.same_recipe.contrast", "reward.golden=false")
BEST = ("algorithm/noise=elite_step", "algorithm.noise.take=elites", "algorithm.noise.correction=none")

on_ranks = ranks_of_module()


def make_trainer(weights: Path, output: Path, *words: str) -> Trainer:
    words = ("seed=5", "model.guidance_scale=3.0", "runtime.micro_batch=4", *WINDOW, *REWARD, *words)
    trainer = build_trainer(tiny(weights, output, *words))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in trainer.model.trainable.values():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.05)
    return trainer


def roll(trainer: Trainer, size: int = 4) -> tuple[Samples, Trajectories[TrainedSteps]]:
    """In batches of ``size``, which are not made even: the last may be filled up."""
    samples = Samples.all_of(trainer.prompts.at(0), GROUP_SIZE)
    rollout = trainer.rollout
    assert isinstance(rollout, StepRollout)
    assert isinstance(rollout.find_noise, StepNoise)
    sampler = replace(rollout.sampler, batch_sizes=BatchSizes.of(size))
    rollout = replace(rollout, sampler=sampler, find_noise=replace(rollout.find_noise, sampler=sampler))
    noise = trainer.start_noise(samples, 0)
    return samples, rollout(samples, trainer.model.encode(samples.texts), noise, 0)


def estimates_of(chosen: ChosenNoise) -> Tensor:
    assert chosen.estimates_PG is not None
    return chosen.estimates_PG


def mean_and_std(grid: Any, step: int, x: Tensor, v: Tensor) -> tuple[Tensor, float]:
    """Flow-GRPO's published step."""
    t, t_next = grid[step], grid[step + 1]
    s = 0.7 * math.sqrt(t / (1 - t))
    return x + (v + s**2 / (2 * t) * (x + (1 - t) * v)) * (t_next - t), s * math.sqrt(t - t_next)


def estimate_times(t_next: float, num_steps: int) -> list[float]:
    """Even steps from t_next to 0 before SD3's shift of 3."""
    u = t_next / (3 - 2 * t_next)
    return [3 * v / (1 + 2 * v) for v in (u * (num_steps - i) / num_steps for i in range(num_steps + 1))]


@pytest.mark.parametrize("num_steps", [1, 2])
@torch.no_grad()
def test_the_step_takes_the_candidate_whose_image_has_the_best_reward(
    num_steps: int, tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (*BEST, "algorithm.noise.candidates=4", f"algorithm.noise.estimate_steps={num_steps}")
    trainer = make_trainer(tiny_weights, tmp_path / "run", *words)
    times: list[float] = []
    run = PipelineModel._run

    def spy(self, transformer, t: float, *arguments):
        times.append(t)
        return run(self, transformer, t, *arguments)

    begin_search, judged = Rewards.begin_search, []

    def overhear(self, prompts: list[Prompt]):
        judged.append(prompts)
        return begin_search(self, prompts)

    with monkeypatch.context() as patch:
        patch.setattr(PipelineModel, "_run", spy)
        patch.setattr(Rewards, "begin_search", overhear)
        samples, trajectories = roll(trainer)
    # four samples at a time, the last two filled up
    rows = [[0, 1, 2, 3], [4, 5, 0, 1]]
    assert judged == [[samples.asked[row] for row in part for _ in range(4)] for part in rows]
    trained, chosen, grid = trajectories.trained, trajectories.chosen, trainer.algorithm.grid
    assert chosen is not None
    step = trained.steps[0]
    assert step > 0
    expected_times = estimate_times(grid[step + 1], num_steps)
    assert {round(t, 9) for t in times} == {round(t, 9) for t in (*grid[:-1], *expected_times[:-1])}
    x = trajectories.start_BCHW
    conditions = trainer.model.encode(samples.texts)
    for t, t_next in pairwise(grid[: step + 1]):
        x = x + (t_next - t) * combined(trainer.model.velocity(x, t, conditions))
    torch.testing.assert_close(trained.x_TBCHW[0], x, rtol=1e-4, atol=1e-5)
    mean, std = mean_and_std(grid, step, x, combined(trainer.model.velocity(x, grid[step], conditions)))
    for row, (prompt_id, place) in enumerate(zip(samples.prompt_ids, samples.places, strict=True)):
        ids = torch.tensor([place + GROUP_SIZE * k for k in range(4)])
        drawn = philox_normal(SEED, 1000 + step, torch.tensor([prompt_id]), ids, x[0].numel()).view(4, *x.shape[1:])
        z = mean[row] + std * drawn
        own = conditions.take([row] * 4)
        for t, t_next in pairwise(expected_times):
            z = z + (t_next - t) * combined(trainer.model.velocity(z, t, own))
        scores = contrast(trainer.model.decode(z), [""] * 4)
        assert scores.sort().values.diff()[-1] > 1e-5
        assert torch.equal(chosen.noise_BCHW[row], drawn[scores.argmax()])
        torch.testing.assert_close(estimates_of(chosen).flatten()[row], scores.max(), rtol=1e-4, atol=1e-6)
        # all of them, a row a group, are there to be shown
        (seen,) = trajectories.noted(trainer.start_noise(samples, 0)).scored
        group, place_in_it = divmod(row, GROUP_SIZE)
        assert seen.places == tuple(range(len(samples.prompts)))
        shown_M = seen.scores_PK[group].view(GROUP_SIZE, 4)[place_in_it]
        torch.testing.assert_close(shown_M, scores, rtol=1e-4, atol=1e-6)
        # and it is this noise that the step took, whose likelihood is stored
        x_next = mean[row] + std * drawn[scores.argmax()]
        log_prob = torch.distributions.Normal(mean[row], std).log_prob(x_next).mean()
        torch.testing.assert_close(trained.x_next_TBCHW[0, row], x_next, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(trained.log_prob_TB[0, row], log_prob, rtol=1e-4, atol=1e-5)
    # the next step draws as ever
    x = trained.x_TBCHW[1]
    mean, std = mean_and_std(grid, step + 1, x, combined(trainer.model.velocity(x, grid[step + 1], conditions)))
    ids_P = torch.tensor(samples.prompts.ids)
    plain = philox_normal(SEED, 1001 + step, ids_P, torch.arange(GROUP_SIZE), x[0].numel()).view(x.shape)
    torch.testing.assert_close(trained.x_next_TBCHW[1], mean + std * plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "words",
    [
        ("algorithm/noise=elite_step",),
        ("algorithm/noise=elite_paper_step",),
        ("algorithm/noise=elite_paper_step", "algorithm.noise.correction=imitate"),
        ("algorithm/noise=elite_step", "algorithm.noise.shares_start=true", "algorithm.noise.candidates=2"),
    ],
    ids=["weights", "paper", "imitate", "shared"],
)
def test_the_ratio_of_a_searched_step_is_exactly_one_whatever_the_search(
    words: tuple[str, ...], tiny_weights: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(tiny_weights, tmp_path / "run", *words)
    metrics = trainer.step()
    assert metrics["ratio_deviation"] == metrics["clip_fraction"] == 0.0
    assert metrics["grad_norm"] > 0
    assert "search/gain" in metrics
    # one noise for the group is no better within it than any other
    is_shared = trainer.algorithm.noise.gives_one_noise  # type: ignore[attr-defined]
    assert ("search/rank_correlation" in metrics) == (not is_shared)
    assert ("search/effective_share" in metrics) == (trainer.algorithm.noise.correction == "weights")  # type: ignore[attr-defined]
    stages = ("encode", "search", "rollout", "reward", "update")
    total = sum(metrics[f"seconds/{stage}"] for stage in stages)
    assert total == pytest.approx(metrics["seconds/iteration"], rel=0.1)
    # tens of passes, where without a search it takes microseconds
    assert metrics["seconds/search"] > 0.2 * metrics["seconds/rollout"]


@pytest.mark.parametrize("take", ["drawn", "elites", "mean"])
def test_a_search_of_one_candidate_is_the_plain_recipe_bit_for_bit(
    take: str, tiny_weights: Path, tmp_path: Path
) -> None:
    correction = "weights" if take == "drawn" else "none"
    words = (
        *("algorithm/noise=elite_step", f"algorithm.noise.take={take}", f"algorithm.noise.correction={correction}"),
        *("algorithm.noise.candidates=1", "algorithm.noise.elites=1"),
    )
    searched = make_trainer(tiny_weights, tmp_path / "searched", *words)
    plain = make_trainer(tiny_weights, tmp_path / "plain", "algorithm/noise=gaussian")
    for trainer in (searched, plain):
        trainer.step()
        trainer.step()
    for one, other in zip(searched.model.trainable.values(), plain.model.trainable.values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("shares_start", [False, True])
def test_the_batches_change_no_choice(shares_start: bool, tiny_weights: Path, tmp_path: Path) -> None:
    found, noises = [], []
    for size in (1, 4, 6):
        words = (*BEST, "algorithm.noise.candidates=6", f"algorithm.noise.shares_start={str(shares_start).lower()}")
        found.append(roll(make_trainer(tiny_weights, tmp_path / f"{size}", *words), size)[1])
        assert found[-1].chosen is not None
        noises.append(found[-1].chosen)
    for noise in noises[1:]:
        assert torch.equal(noise.noise_BCHW, noises[0].noise_BCHW)
        torch.testing.assert_close(estimates_of(noise), estimates_of(noises[0]), rtol=1e-3, atol=1e-5)
    for other in found[1:]:
        torch.testing.assert_close(other.images_BCHW, found[0].images_BCHW, rtol=0, atol=1e-4)
    if shares_start:
        x_GX = found[0].trained.x_TBCHW[0, :GROUP_SIZE].flatten(1)
        assert (x_GX == x_GX[:1]).all()
        assert torch.pdist(found[0].trained.x_next_TBCHW[0, :GROUP_SIZE].flatten(1)).min() > 0.1


# two optimizer steps, so that ranks hold samples of one group out of order
RANKS = ("train.optimizer_steps=2", "model.dtype=float64", "model.decode_dtype=float64", *WINDOW)


@pytest.mark.parametrize(
    "words",
    [
        ("algorithm/noise=elite_step",),
        ("algorithm/noise=elite_step", "algorithm.noise.shares_start=true", "algorithm.noise.candidates=2"),
        (
            "algorithm/noise=elite_paper_step",
            "algorithm.noise.correction=imitate",
            "algorithm.noise.shares_start=false",
            "algorithm.noise.candidates=3",
        ),
    ],
    ids=["weights", "shared", "imitate"],
)
def test_two_ranks_train_as_one(words: tuple[str, ...], tiny_weights: Path, tmp_path: Path, on_ranks: Ranks) -> None:
    config = make_config(tiny_weights, *RANKS, *words)
    alone = train(World(), config, tmp_path / "alone")
    assert any("search/gain" in row for row in alone.rows)
    for run in on_ranks(2, train, config, tmp_path / "two"):
        assert beyond_rounding(differences(alone, run), "float64") == {}


def chosen_of(scale: list[float], offset: list[float]) -> ChosenNoise:
    nothing = torch.empty(0)
    return ChosenNoise(nothing, torch.tensor(scale), torch.tensor(offset), nothing, {})


@pytest.mark.parametrize(
    ("scale", "offset"),
    [([0.5, 2.0, 1.0, 1.5, 0.25, 3.0], [0.0] * 6), ([0.0] * 6, [0.75] * 6)],
    ids=["weights", "imitate"],
)
def test_the_gradient_is_that_of_the_corrected_advantages_in_the_searched_step_alone(
    scale: list[float], offset: list[float], tiny_weights: Path
) -> None:
    it = make_iteration(tiny_weights)
    trained = it.trajectories.trained.chosen_by(chosen_of(scale, offset))
    it = replace(it, trajectories=replace(it.trajectories, trained=trained))
    recorder = Recorder(it.model)
    # in two shares, so that rows are selected, and in batches of 2, of which one of each share is filled up
    update: Update = it.update(recorder, optimizer_steps=2)
    stats = apply(update, it)
    assert stats.deviation == 0.0
    corrected = torch.tensor(scale) * ADVANTAGES + torch.tensor(offset)
    for gradients, share in zip(recorder.gradients, update.shares(6, iteration=2), strict=True):
        searched, others = (
            expected_terms(it, OBJECTIVE, share, advantages)[0] for advantages in (corrected, ADVANTAGES)
        )
        # each sample has its two steps in a row, of which the first was searched
        losses = torch.where(torch.arange(len(others)) % len(STEPS) == 0, searched, others)
        assert_same_gradients(gradients, gradients_of(it, losses))


def test_imitation_does_not_depend_on_what_the_images_are_worth(tiny_weights: Path) -> None:
    it: Iteration = make_iteration(tiny_weights)
    whole = it.trajectories.trained
    # the searched step alone
    constant = TrainedSteps(STEPS[:1], *(part[:1] for part in whole.tensors[:5]))
    first = constant.chosen_by(chosen_of([0.0] * 6, [1.5] * 6))
    found = []
    for trained, advantages in ((first, ADVANTAGES), (first, -3 * ADVANTAGES), (constant, torch.full((6,), 1.5))):
        recorder = Recorder(it.model)
        one = replace(it, trajectories=replace(it.trajectories, trained=trained))
        apply(it.update(recorder), one, advantages)
        found.append(recorder.gradients[0])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)


def test_corrections_follow_their_samples() -> None:
    nothing = torch.empty(0, 3)
    trained = TrainedSteps((2, 3), nothing, nothing, torch.zeros(2, 3), nothing, nothing)
    assert trained.advantages(0, torch.ones(3)).tolist() == [1.0] * 3
    searched = trained.chosen_by(chosen_of([2.0, 3.0, 4.0], [0.5, 0.0, -1.0]))
    assert searched.advantages(0, torch.tensor([1.0, 2.0])).tolist() == [2.5, 6.0]
    assert searched.advantages(1, torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]
    turned = searched.select(lambda part, dim: part.flip(dim))
    assert turned.advantages(0, torch.ones(3)).tolist() == [3.0, 3.0, 2.5]
    assert turned.cat(searched).advantages(0, torch.ones(6)).tolist() == [3.0, 3.0, 2.5, 2.5, 3.0, 3.0]


def test_what_it_searches_by_is_what_the_run_has(tiny_weights: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_weights, tmp_path / "run", "algorithm/noise=elite_step")
    assert isinstance(trainer.rollout, StepRollout)
    search = trainer.rollout.find_noise
    assert isinstance(search, StepNoise)
    assert search.sampler is trainer.rollout.sampler
    assert search.rewards is trainer.rewards
    assert search.algorithm is trainer.algorithm
    assert (search.seed, search.world) == (5, trainer.world)
    _, trajectories = roll(trainer)
    assert trajectories.chosen is not None
    scale_B = trajectories.chosen.scale_B
    assert (scale_B != 1).any()
    assert torch.equal(trajectories.trained.scale_TB, torch.stack([scale_B, torch.ones(6)]))
    assert torch.equal(trajectories.trained.offset_TB, torch.zeros(2, 6))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("algorithm=nft", "algorithm/noise=elite_step"),
            "algorithm.noise.target=step searches the noise of a stochastic step, but algorithm.objective NFT learns "
            "from images, whose rollout has none; use algorithm/noise=gaussian",
        ),
        (
            ("algorithm=chunk_grpo", "algorithm/noise=elite_step"),
            "algorithm.noise.correction=weights changes the advantage of one step, but algorithm.objective has one "
            "ratio for several; use algorithm.objective.chunk_sizes=[1]",
        ),
        (
            ("algorithm=flow_grpo", "algorithm/noise=elite_step", "train.gradients=reweight"),
            "train.gradients=reweight has one advantage for all steps of a sample, and algorithm.noise.correction="
            "weights another for the first; use train.gradients=replay",
        ),
        (
            ("algorithm=flow_grpo", "algorithm/noise=elite_step", "algorithm.noise.estimate_steps=5"),
            "algorithm.noise.estimate_steps must be at most algorithm.schedule.num_steps = 4, got 5",
        ),
        (
            ("algorithm=flow_grpo", "algorithm/noise=elite_paper_step", "algorithm.noise.elites=4"),
            "algorithm.noise.elites must be at most the 3 candidates of a search, got 4",
        ),
        (
            (
                *("algorithm=flow_grpo", "algorithm/noise=elite_paper_step"),
                *("algorithm/timesteps=sliding_window", "algorithm.timesteps.size=1"),
            ),
            "algorithm.noise.take=mean gives a group that starts from one noise one noise in the only stochastic step",
        ),
    ],
    ids=["images", "chunks", "reweight", "estimate", "group", "same images"],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_loaded(
    words: tuple[str, ...], message: str, tiny_weights: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        RunParts.read(tiny(tiny_weights, tmp_path / "run", *words))


def test_reweighting_and_chunks_are_left_to_the_papers_letter(tiny_weights: Path, tmp_path: Path) -> None:
    letter = ("algorithm/noise=elite_paper_step",)
    for words in (("algorithm=chunk_grpo",), ("algorithm=flow_grpo_fast", "train.gradients=reweight")):
        words_here = (*words, "algorithm.schedule.num_steps=6", *letter)
        assert isinstance(RunParts.read(tiny(tiny_weights, tmp_path / "run", *words_here)).algorithm, Algorithm)


@pytest.mark.parametrize("noise", ["gaussian", "elite_paper_step"])
def test_gradients_taken_in_the_rollout_are_those_of_a_replay(noise: str, tiny_weights: Path, tmp_path: Path) -> None:
    moved = []
    for gradients in ("replay", "reweight"):
        words = (f"algorithm/noise={noise}", f"train.gradients={gradients}", "algorithm.objective.kl_coef=0.0")
        trainer = make_trainer(tiny_weights, tmp_path / gradients, *words, "train.learning_rate=1e-2")
        before = [weight.detach().clone() for weight in trainer.model.trainable.values()]
        assert trainer.step()["ratio_deviation"] < 1e-5
        moved.append([a - b for a, b in zip(trainer.model.trainable.values(), before, strict=True)])
    similar = [torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) for a, b in zip(*moved, strict=True)]
    assert min(similar) > 0.99
