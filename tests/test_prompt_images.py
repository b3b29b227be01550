"""Images of prompts as a function: of the model in miniature, with its own noise, conditions and guidance."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgrpo.algorithm.algorithm import Algorithm
from fastgrpo.algorithm.image_search import BestOfEstimates, BestOfN, Elite, Halving
from fastgrpo.algorithm.making import Search
from fastgrpo.config import load_config
from fastgrpo.image_search import plain
from fastgrpo.memory.batches import BatchSizes
from fastgrpo.models.adapter import FlowModel
from fastgrpo.models.pipeline_model import PipelineModel
from fastgrpo.parts import build_model
from fastgrpo.pieces import build
from fastgrpo.prompt_images import PromptImages, search_images
from fastgrpo.rewards.weighted_sum import Rewards
from fastgrpo.sampler import Sampler
from fastgrpo.types import Prompt
from fastgrpo_kernels import philox_normal
from tests.tiny import PROMPTS

SEARCHES: list[Search] = [BestOfN(), BestOfEstimates(estimate_steps=2), Elite(estimate_steps=2), Halving()]
WORDS = ("prompt=a", "model.resolution=32", "runtime.device=cpu")


def roughness(images_BCHW: Tensor, prompts: list[str]) -> Tensor:
    """Differences of neighbours: more than files' sizes, no two images have the same."""
    return 100 * images_BCHW.diff(dim=3).abs().mean(dim=(1, 2, 3))


REWARDS = Rewards(terms={"rough": roughness}, weights={"rough": 1.0})


@pytest.fixture(scope="module")
def algorithm() -> Algorithm:
    return build(load_config("sample", WORDS).algorithm)


@pytest.fixture(scope="module")
def model(tiny_weights: Path) -> FlowModel:
    return build_model(load_config("sample", [*WORDS, f"model.weights={tiny_weights}"]))


@pytest.fixture(scope="module")
def guided(tiny_weights: Path) -> FlowModel:
    words = [*WORDS, f"model.weights={tiny_weights}", "model.guidance_scale=2.5"]
    return build_model(load_config("sample", words))


def plain_images(model: FlowModel, algorithm: Algorithm, num_steps: int, batch: int = 16) -> list[Tensor]:
    sampler = Sampler(model=model, grid=algorithm.evaluation_grid(num_steps), batch_sizes=BatchSizes.of(batch))
    make = PromptImages(sampler=sampler, make=plain(sampler), images_per_prompt=2, seed=9)
    made: dict[int, Tensor] = {}
    for places, searched in make([Prompt(text) for text in PROMPTS]):
        made |= dict(zip(places, searched.images_BCHW.split(2), strict=True))
        assert searched.scores_B.isnan().all()
    return [made[place] for place in range(len(PROMPTS))]


@pytest.mark.parametrize("search", SEARCHES, ids=str)
@pytest.mark.parametrize("is_guided", [False, True])
def test_a_search_of_one_candidate_is_the_plain_image_bit_for_bit(
    search: Search, is_guided: bool, request: pytest.FixtureRequest, algorithm: Algorithm
) -> None:
    model = request.getfixturevalue("guided" if is_guided else "model")
    # a batch that ten images do not divide into
    sizes = BatchSizes.of(4)
    found = search_images(
        model,
        PROMPTS,
        REWARDS,
        algorithm=algorithm,
        search=search,
        budget=3 * (1 + is_guided),
        images_per_prompt=2,
        num_steps=3,
        seed=9,
        batch_sizes=sizes,
    )
    expected = plain_images(model, algorithm, num_steps=3, batch=4)
    assert torch.equal(torch.stack(found.images), torch.stack(expected))
    assert found.cost.evaluations == 10 * 3 * (1 + is_guided)
    assert found.cost.scored == 10


def test_the_best_of_n_is_the_best_of_n_plain_images(model: FlowModel, algorithm: Algorithm) -> None:
    """By brute force: each candidate on its own, through the network and the autoencoder."""
    found = search_images(
        model,
        PROMPTS,
        REWARDS,
        algorithm=algorithm,
        search=BestOfN(),
        budget=15,
        num_steps=3,
        seed=9,
        # some prompts after the others
        batch_sizes=BatchSizes.of(2),
    )
    sampler = Sampler(model=model, grid=algorithm.evaluation_grid(3), batch_sizes=BatchSizes.of(1))
    for place, text in enumerate(PROMPTS):
        draws = [(0, 0), *((5000, 65536 * number) for number in range(1, 5))]
        noises = [philox_normal(9, stream, torch.tensor([place]), torch.tensor([one]), 256) for stream, one in draws]
        conditions = model.encode([text])
        images = [sampler.finished(x.view(1, 16, 4, 4), conditions, range(3), lambda _: None, 1)[1][0] for x in noises]
        scores = roughness(torch.stack(images), [text])
        torch.testing.assert_close(found.images[place][0], images[int(scores.argmax())], rtol=0, atol=1e-5)
        torch.testing.assert_close(found.scores_PG[place, 0], scores.max(), rtol=1e-4, atol=0)


def test_estimates_have_times_of_their_own(
    model: FlowModel, algorithm: Algorithm, monkeypatch: pytest.MonkeyPatch
) -> None:
    times: set[float] = set()
    run = PipelineModel._run

    def spy(self, transformer, t: float, *others):
        times.add(t)
        return run(self, transformer, t, *others)

    monkeypatch.setattr(PipelineModel, "_run", spy)
    search_images(
        model, ["a"], REWARDS, algorithm=algorithm, search=BestOfEstimates(estimate_steps=2), budget=9, num_steps=3
    )
    # SD3's shift of 3 on 1 and 1/2, and SD3's own grid, which begins there too
    assert times == {1.0, 0.75} | set(algorithm.evaluation_grid(3)[:3])
    assert 0.75 not in algorithm.evaluation_grid(2) + algorithm.evaluation_grid(3)


@pytest.mark.parametrize("search", SEARCHES, ids=str)
def test_evaluations_are_rows_of_the_network_and_more_of_them_find_more(
    search: Search, guided: FlowModel, algorithm: Algorithm, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = 0
    run = PipelineModel._run

    def spy(self, transformer, t, x_BCHW, *others):
        nonlocal rows
        rows += len(x_BCHW)
        return run(self, transformer, t, x_BCHW, *others)

    monkeypatch.setattr(PipelineModel, "_run", spy)
    told: list[int] = []
    means = []
    for budget in (6, 48):
        rows = 0
        told.clear()
        found = search_images(
            guided,
            PROMPTS[:2],
            REWARDS,
            algorithm=algorithm,
            search=search,
            budget=budget,
            num_steps=3,
            batch_sizes=BatchSizes.of(1),
            watch=told.append,
        )
        assert rows == found.cost.evaluations == sum(told)
        assert budget * 2 - 2 * 12 <= rows <= budget * 2
        means.append(found.scores_PG.mean())
        torch.testing.assert_close(found.scores_PG.flatten(), roughness(torch.cat(found.images), []))
    assert means[1] > means[0]


def test_images_and_scores_are_those_of_their_prompts_whatever_their_resolution(
    model: FlowModel, algorithm: Algorithm
) -> None:
    def of_text(images_BCHW: Tensor, prompts: list[str]) -> Tensor:
        return roughness(images_BCHW, prompts) + 1000.0 * torch.tensor([float(len(text)) for text in prompts])

    rewards = replace(REWARDS, terms={"rough": of_text})
    search: Callable[..., Any] = search_images
    found = search(model, list(PROMPTS), rewards, algorithm=algorithm, budget=9, num_steps=3, images_per_prompt=2)
    assert (found.scores_PG / 1000).floor().tolist() == [[len(text)] * 2 for text in PROMPTS]
    alone = search(model, [PROMPTS[0]], rewards, algorithm=algorithm, budget=9, num_steps=3, images_per_prompt=2)
    torch.testing.assert_close(alone.images[0], found.images[0], rtol=0, atol=1e-5)
    assert not torch.equal(found.images[0][0], found.images[0][1])
    nothing = search(model, [], rewards, algorithm=algorithm)
    assert (nothing.images, nothing.scores_PG.numel(), nothing.cost.evaluations) == ([], 0, 0)


def test_no_images_are_refused(model: FlowModel, algorithm: Algorithm) -> None:
    with pytest.raises(ValueError, match="images_per_prompt must be at least 1, got 0"):
        search_images(model, PROMPTS, REWARDS, algorithm=algorithm, images_per_prompt=0)
