"""Evaluation starts from noise of its own: the same in every run, and never that of training."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor

from fastgrpo.algorithm.image_search import BestOfEstimates, BestOfN, Elite, Halving
from fastgrpo.algorithm.making import Search
from fastgrpo.algorithm.noise import EVALUATION_STREAM, NoiseDraw
from fastgrpo.algorithm.schedule import LinearSchedule
from fastgrpo.assembly import build_trainer
from fastgrpo.distributed.world import World
from fastgrpo.evaluation import Evaluation
from fastgrpo.image_search import ImageSearch
from fastgrpo.memory.batches import BatchSizes
from fastgrpo.rewards.weighted_sum import Rewards
from fastgrpo.sampler import Sampler
from fastgrpo.types import Prompt, Prompts, Samples
from fastgrpo_kernels import philox_normal
from tests.distributed import training
from tests.field import Field, reward
from tests.ranks import Ranks, ranks_of_module
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


on_ranks = ranks_of_module()
GRID = LinearSchedule(5, 3.0)()
SEARCHES: list[Search] = [BestOfN(), BestOfEstimates(estimate_steps=2), Elite(estimate_steps=2), Halving()]


def brightness(images_BCHW: Tensor, prompts: list[str]) -> Tensor:
    return images_BCHW.mean(dim=(1, 2, 3))


def search_of(model: Any, rewards: Rewards, search: Search, batch: int, budget: int = 38) -> ImageSearch:
    return ImageSearch(
        sampler=Sampler(model=model, grid=GRID, batch_sizes=BatchSizes.of(batch)),
        rewards=rewards,
        search=search,
        budget=budget,
        estimate_grid=lambda num_steps: LinearSchedule(num_steps, 3.0)(),
    )


def evaluated(
    world: World, search: Search | None, batch: int = 4, in_lockstep: bool = False, budget: int = 38
) -> tuple[dict[str, Tensor], int, int, Tensor]:
    """Scores, network evaluations and calls of the network on this rank, and the images shown; of 5 prompts, 3 each."""
    model: Any = Field(in_lockstep=in_lockstep)
    rewards = Rewards(terms={"reward": reward}, weights={"reward": 1.0}, watch={"bright": brightness})
    evaluation = Evaluation(
        model=model,
        rewards=rewards,
        prompts=[Prompt(text) for text in TEXTS],
        images_per_prompt=3,
        grid=GRID,
        batch_sizes=BatchSizes.of(batch),
        seed=0,
        world=world,
        search=search_of(model, rewards, search, batch, budget) if search else None,
    )
    result = evaluation()
    shown = torch.stack(result.images) if result.images else torch.empty(0)
    return result.scores, result.cost.evaluations, model.calls, shown


@pytest.mark.parametrize("search", SEARCHES, ids=str)
def test_an_evaluation_of_searched_images_judges_what_the_search_finds_of_its_noise(search: Search) -> None:
    scores, evaluations, _, shown = evaluated(World(), search)
    model: Any = Field()
    rewards = Rewards(terms={"reward": reward}, weights={"reward": 1.0})
    samples = Samples.all_of(Prompts(list(TEXTS), list(range(5))), 3)
    draw = NoiseDraw(0, list(range(5)), 3, (1, 2, 2))
    found = search_of(model, rewards, search, 64)(samples, draw, EVALUATION_STREAM)
    assert torch.equal(scores["reward"].flatten(), found.scores_B)
    assert torch.equal(scores["bright"].flatten(), brightness(found.images_BCHW, []))
    assert torch.equal(shown, found.images_BCHW[::3])
    # fifteen images in batches of four: none is made for nothing
    assert evaluations == found.cost.evaluations == 15 * search.plan(38, 5).velocities
    plain = evaluated(World(), None)
    assert (scores["reward"] > plain[0]["reward"]).float().mean() > 0.7
    assert plain[1] == 15 * 5


@pytest.mark.parametrize("search", SEARCHES, ids=str)
def test_a_search_that_affords_one_image_is_the_plain_evaluation(search: Search) -> None:
    plain, found = evaluated(World(), None), evaluated(World(), search, budget=5)
    assert all(torch.equal(found[0][name], plain[0][name]) for name in plain[0])
    assert torch.equal(found[3], plain[3])
    assert found[1:3] == plain[1:3]


@pytest.mark.parametrize("search", [*SEARCHES, None], ids=str)
def test_ranks_search_for_their_own_images_and_find_what_one_finds(search: Search | None, on_ranks: Ranks) -> None:
    alone = evaluated(World(), search)
    for num_ranks in (2, 4):
        for in_lockstep in (False, True):
            ranks = on_ranks(num_ranks, evaluated, search, batch=3, in_lockstep=in_lockstep)
            for scores, *_ in ranks:
                assert all(torch.equal(scores[name], alone[0][name]) for name in alone[0])
            assert torch.equal(ranks[0][3], alone[3])
            # each as often as the others, as where weights are spread over them
            assert len({calls for _, _, calls, _ in ranks}) == 1


def searched_by_a_run(world: World, config: DictConfig, output: Path) -> dict[str, Tensor]:
    """Scores of an evaluation of a run's own model and reward, with a search."""
    evaluation = training.make_trainer(world, config, output).evaluation
    search = search_of(evaluation.model, evaluation.rewards, Halving(), batch=3, budget=9)
    sampler = Sampler(model=evaluation.model, grid=evaluation.grid, batch_sizes=evaluation.batch_sizes)
    return replace(evaluation, search=replace(search, sampler=sampler))().scores


@pytest.mark.parametrize("rollout_weights", ["gathered", "sharded"])
def test_ranks_that_share_the_weights_find_what_one_finds(
    rollout_weights: str, tiny_weights: Path, tmp_path: Path, on_ranks: Ranks
) -> None:
    words = ("adaptation=full", f"adaptation.rollout_weights={rollout_weights}", "reward.golden=false")
    config = training.make_config(tiny_weights, *training.FLOAT64, *words, "evaluate.images_per_prompt=1")
    alone = searched_by_a_run(World(), config, tmp_path / "1")
    # five images on three ranks
    for scores in on_ranks(3, searched_by_a_run, config, tmp_path / "3"):
        for name, score_PG in alone.items():
            torch.testing.assert_close(scores[name], score_PG, rtol=0, atol=1e-6)
