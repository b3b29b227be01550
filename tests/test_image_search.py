"""Searches of images on a model: what they find, by independent computations, and what that takes."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgrpo.algorithm.image_search import BestOfEstimates, BestOfN, Elite, Halving
from fastgrpo.algorithm.making import Found, Making, Plan, Search
from fastgrpo.algorithm.noise import NoiseDraw
from fastgrpo.algorithm.schedule import LinearSchedule
from fastgrpo.image_search import ImageSearch, plain
from fastgrpo.memory.batches import BatchSizes
from fastgrpo.resolution import Resolution
from fastgrpo.rewards.reward import RewardError
from fastgrpo.rewards.weighted_sum import Rewards
from fastgrpo.sampler import Sampler
from fastgrpo.types import Prompts, Samples
from fastgrpo_kernels import philox_normal
from tests.field import Field, decoded, reward, velocity

TEXTS = ["a", "three"]
IDS = [7, 2]
GRID = LinearSchedule(5, 3.0)()
HALVING = Halving(looks=(0.5, 0.7), keep=0.5)
SEARCHES: list[Search] = [BestOfN(), BestOfEstimates(estimate_steps=2), Elite(estimate_steps=2), HALVING]
REWARDS = Rewards(terms={"reward": reward}, weights={"reward": 1.0})


def estimate_grid(num_steps: int) -> tuple[float, ...]:
    return LinearSchedule(num_steps, 3.0)()


def searching(search: Search, *, budget: int = 38, batch: int = 4, model: Any = None, **settings: Any) -> ImageSearch:
    model = Field() if model is None else model
    return ImageSearch(
        sampler=Sampler(model=model, grid=GRID, batch_sizes=BatchSizes.of(batch)),
        search=search,
        budget=budget,
        **{"rewards": REWARDS, "estimate_grid": estimate_grid, **settings},
    )


def samples_and_draw(*rows: int) -> tuple[Samples, NoiseDraw]:
    """Three images of each of two prompts, or the rows of these."""
    own = rows or tuple(range(6))
    return Samples(Prompts(TEXTS, IDS), 3, own), NoiseDraw(5, IDS, 3, (1, 2, 2), rows=own)


def noise(row: int, numbers: range, stream: int = 5000) -> Tensor:
    """Candidates of an image, from the counter-based generator itself."""
    prompt, place = divmod(row, 3)
    ids = [place + 65536 * number for number in numbers]
    return philox_normal(5, stream, torch.tensor([IDS[prompt]]), torch.tensor(ids), 4).view(-1, 1, 2, 2)


def candidates(row: int, num: int) -> Tensor:
    plain_noise = noise(row, range(1), stream=0)
    return torch.cat([plain_noise, noise(row, range(1, num))]) if num > 1 else plain_noise


def along(x: Tensor, times: tuple[float, ...], row: int) -> Tensor:
    for t, t_next in pairwise(times):
        x = x + (t_next - t) * velocity(x, t, float(len(TEXTS[row // 3])))
    return x


def scored(x_0: Tensor, row: int) -> Tensor:
    return reward(decoded(x_0), [TEXTS[row // 3]] * len(x_0))


# what each search finds for a row, with a budget of 38 velocities and images of 5 steps


def best_of_seven(row: int) -> Tensor:
    x_0 = along(candidates(row, 7), GRID, row)
    return x_0[scored(x_0, row).argmax()]


def best_of_sixteen_estimates(row: int) -> Tensor:
    noises = candidates(row, 16)
    return along(noises[scored(along(noises, estimate_grid(2), row), row).argmax()][None], GRID, row)[0]


def best_of_three_rounds(row: int) -> Tensor:
    """The plain noise and 3 rounds of 5, of which 2 are fitted."""
    seen = candidates(row, 1)
    mean, std = torch.zeros(1, 2, 2), torch.ones(1, 2, 2)
    for number in (1, 2, 3):
        noises = mean + std * noise(row, range(5), stream=5000 + number)
        elites = noises[scored(along(noises, estimate_grid(2), row), row).argsort(descending=True)[:2]]
        mean, std = elites.mean(dim=0), elites.std(dim=0, correction=0).clamp_min(0.05)
        seen = torch.cat([seen, noises])
    return along(seen[scored(along(seen, estimate_grid(2), row), row).argmax()][None], GRID, row)[0]


def last_of_halving(row: int) -> Tensor:
    """Rounds of 2, 2 and 1 steps: of 11 noises 6 go on, of these 4, by x_0 = x - t v of the step that was just made."""
    x = candidates(row, 11)
    for first, stop, num in ((0, 2, 6), (2, 4, 4)):
        before = along(x, GRID[first:stop], row)
        t = GRID[stop - 1]
        looked = before - t * velocity(before, t, float(len(TEXTS[row // 3])))
        kept = scored(looked, row).argsort(descending=True)[:num]
        x = along(before, GRID[stop - 1 : stop + 1], row)[kept]
    x_0 = along(x, GRID[4:], row)
    return x_0[scored(x_0, row).argmax()]


def named(part: object) -> str:
    """Of a parameter; a function's text has its address, which differs from process to process."""
    return getattr(part, "__name__", str(part))


EXPECTED = [best_of_seven, best_of_sixteen_estimates, best_of_three_rounds, last_of_halving]


@pytest.mark.parametrize(("search", "expected"), list(zip(SEARCHES, EXPECTED, strict=True)), ids=named)
def test_what_a_search_finds_is_what_a_few_lines_find(search: Search, expected) -> None:
    found = searching(search)(*samples_and_draw())
    images = torch.stack([decoded(expected(row)[None])[0] for row in range(6)])
    torch.testing.assert_close(found.images_BCHW, images, rtol=0, atol=1e-5)
    texts = [text for text in TEXTS for _ in range(3)]
    torch.testing.assert_close(found.scores_B, reward(found.images_BCHW, texts))
    # it is worth its price, and images of a prompt stay different
    before = plain(searching(search).sampler)(*samples_and_draw()).images_BCHW
    assert (found.scores_B > reward(before, texts) - 1e-6).float().mean() > 0.8
    assert found.scores_B.mean() > reward(before, texts).mean() + 0.02
    assert found.scores_B.unique().numel() == 6


def test_a_look_is_not_the_end() -> None:
    """The case of halving above would not tell a look from the final reward if both agreed."""
    differ = 0
    for row in range(6):
        x = candidates(row, 11)
        before = along(x, GRID[:2], row)
        looked = before - GRID[1] * velocity(before, GRID[1], float(len(TEXTS[row // 3])))
        final = scored(along(x, GRID, row), row)
        differ += {*scored(looked, row).argsort()[5:].tolist()} != {*final.argsort()[5:].tolist()}
    assert differ >= 3


def test_the_best_of_n_is_the_best_that_the_sampler_makes_of_plain_noises() -> None:
    """By brute force, through the sampler of everything else."""
    engine = searching(BestOfN())
    found = engine(*samples_and_draw())
    for row in range(6):
        text = TEXTS[row // 3]
        made = engine.sampler(
            Samples.all_of(Prompts([text], [0]), 7), engine.sampler.model.encode([text] * 7), candidates(row, 7)
        )
        scores = reward(made, [text] * 7)
        torch.testing.assert_close(found.images_BCHW[row], made[scores.argmax()], rtol=0, atol=1e-6)
        torch.testing.assert_close(found.scores_B[row], scores.max())


@pytest.mark.parametrize("search", SEARCHES, ids=str)
def test_nothing_that_is_found_depends_on_batches_or_on_what_is_made_beside_it(search: Search) -> None:
    expected = searching(search)(*samples_and_draw())
    for batch in (1, 3, 64):
        found = searching(search, batch=batch)(*samples_and_draw())
        assert torch.equal(found.images_BCHW, expected.images_BCHW)
        assert torch.equal(found.scores_B, expected.scores_B)
        assert found.cost == expected.cost
    part = searching(search)(*samples_and_draw(1, 4, 5))
    assert torch.equal(part.images_BCHW, expected.images_BCHW[[1, 4, 5]])


@pytest.mark.parametrize("search", SEARCHES, ids=str)
@pytest.mark.parametrize("has_two_branches", [False, True])
def test_what_is_spent_is_what_the_network_computed(search: Search, has_two_branches: bool) -> None:
    model = Field(has_two_branches=has_two_branches)
    told: list[int] = []
    # no batch is filled up
    engine = searching(search, model=model, batch=1, watch=told.append)
    found = engine(*samples_and_draw())
    plan = engine.plan
    assert model.rows == found.cost.evaluations == sum(told) == 6 * plan.velocities * (1 + has_two_branches)
    assert found.cost.scored == 6 * plan.scored
    assert found.cost.evaluations <= 6 * 38
    assert plan == search.plan(19 if has_two_branches else 38, 5)
    # conditions are encoded once
    assert model.encoded == [text for text in TEXTS for _ in range(3)]


@pytest.mark.parametrize("search", SEARCHES, ids=str)
def test_guidance_is_that_of_the_sampler(search: Search) -> None:
    engine = searching(search, model=Field(has_two_branches=True), budget=10)
    assert engine.plan.candidates == 1
    found, made = engine(*samples_and_draw()), plain(engine.sampler)(*samples_and_draw())
    assert torch.equal(found.images_BCHW, made.images_BCHW)
    assert found.cost.evaluations == made.cost.evaluations == 6 * 10


def test_halving_under_guidance_looks_along_the_guided_velocity() -> None:
    engine = searching(Halving(looks=(0.6,), keep=0.5), model=Field(has_two_branches=True), budget=32)
    # 16 velocities: rounds of 3 and 2 steps, 4 noises of which 2 go on
    found = engine(*samples_and_draw())

    def guided(x: Tensor, t: float, length: float) -> Tensor:
        return velocity(x, t, 0.0) + 2.0 * (velocity(x, t, length) - velocity(x, t, 0.0))

    for row in range(6):
        x, length = candidates(row, 4), float(len(TEXTS[row // 3]))
        for t, t_next in pairwise(GRID[:3]):
            x = x + (t_next - t) * guided(x, t, length)
        v = guided(x, GRID[2], length)
        kept = scored(x - GRID[2] * v, row).argsort(descending=True)[:2]
        x = (x + (GRID[3] - GRID[2]) * v)[kept]
        for t, t_next in pairwise(GRID[3:]):
            x = x + (t_next - t) * guided(x, t, length)
        best = decoded(x)[scored(x, row).argmax()]
        torch.testing.assert_close(found.images_BCHW[row], best, rtol=0, atol=1e-5)


def test_images_are_handed_on_in_order_and_a_watched_reward_is_not_asked() -> None:
    def never(images_BCHW: Tensor, prompts: list[str]) -> Tensor:
        raise AssertionError("a watched reward was asked by a search")

    handed: list[Tensor] = []
    rewards = replace(REWARDS, watch={"never": never})
    found = searching(Halving(), rewards=rewards)(*samples_and_draw(), hand_on=handed.append)
    assert torch.equal(torch.cat(handed), found.images_BCHW)


def test_terms_count_by_their_weights() -> None:
    def darkness(images_BCHW: Tensor, prompts: list[str]) -> Tensor:
        return -images_BCHW.mean(dim=(1, 2, 3))

    def brightness(images_BCHW: Tensor, prompts: list[str]) -> Tensor:
        return images_BCHW.mean(dim=(1, 2, 3))

    means = {}
    for weight in (0.5, 2.0):
        weights = {"dark": 1.0, "bright": weight}
        rewards = Rewards(terms={"dark": darkness, "bright": brightness}, weights=weights)
        means[weight] = searching(Halving(), rewards=rewards)(*samples_and_draw()).images_BCHW.mean()
    assert means[2.0] > means[0.5] + 0.1


@pytest.mark.parametrize("search", SEARCHES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nothing_is_found_by_a_reward_that_is_no_number(search: Search, bad: float) -> None:
    def broken(images_BCHW: Tensor, prompts: list[str]) -> Tensor:
        rewards_B = reward(images_BCHW, prompts)
        rewards_B[-1] = bad
        return rewards_B

    with pytest.raises(RewardError, match=r"reward 'broken' answered (nan|inf)"):
        searching(search, rewards=Rewards(terms={"broken": broken}, weights={"broken": 1.0}))(*samples_and_draw())


def test_a_sum_that_is_no_number_is_refused() -> None:
    def huge(images_BCHW: Tensor, prompts: list[str]) -> Tensor:
        return torch.full((len(images_BCHW),), 3e38)

    rewards = Rewards(terms={"huge": huge}, weights={"huge": 1e3})
    with pytest.raises(RewardError, match=r"lower reward\.weights"):
        searching(Halving(), rewards=rewards)(*samples_and_draw())


def test_a_budget_that_is_too_small_under_guidance_is_refused_before_anything_is_computed() -> None:
    model = Field(has_two_branches=True)
    with pytest.raises(ValueError, match="raise it to at least 10"):
        searching(Halving(), model=model, budget=9)(*samples_and_draw())
    assert model.rows == 0


def test_a_search_of_ones_own_is_kept_to_its_budget() -> None:
    class Greedy:
        def plan(self, velocities: int, num_steps: int) -> Plan:
            return Plan(candidates=1, velocities=num_steps, scored=1)

        def __call__(self, making: Making) -> Found:
            return making.best(making.slots.noises(8), range(making.num_steps))

    with pytest.raises(ValueError, match=r"Greedy took 40 network evaluations an image of budget=38"):
        searching(Greedy())(*samples_and_draw())


def test_images_of_another_resolution_have_latents_of_theirs() -> None:
    class Wide(Field):
        def latent_shape_of(self, resolution: Resolution | None) -> tuple[int, int, int]:
            return (1, 2, 2) if resolution is None else (1, 2, 3)

    model = Wide()
    samples = Samples(Prompts(TEXTS, IDS, Resolution(2, 3)), 1, (0, 1))
    draw = NoiseDraw(5, IDS, 1, model.latent_shape_of(Resolution(2, 3)))
    assert searching(Halving(), model=model)(samples, draw).images_BCHW.shape == (2, 3, 2, 3)


@pytest.mark.parametrize("search", SEARCHES, ids=str)
def test_a_rank_with_fewer_images_keeps_step_with_the_one_that_has_most(search: Search) -> None:
    """Where weights are spread over ranks all call the network equally often, each batch in one shape."""
    calls = {}
    for rows in ((0, 1, 2, 3, 4), (0, 1)):
        model = Field(in_lockstep=True)
        samples, draw = samples_and_draw(*rows)
        found = searching(search, model=model)(replace(samples, most=5), draw)
        calls[rows] = model.calls, model.rows
        assert found.cost.evaluations == len(rows) * search.plan(38, 5).velocities
    assert len(set(calls.values())) == 1


class SmallField(Field):
    """A field whose estimates are decoded apart, and who counts what is decoded by which."""

    def __init__(self) -> None:
        super().__init__()
        self.num_small, self.num_full = 0, 0

    def decode_estimate(self, x_BCHW: Tensor) -> Tensor:
        self.num_small += len(x_BCHW)
        return Field.decode(self, x_BCHW)

    def decode(self, x_BCHW: Tensor) -> Tensor:
        self.num_full += len(x_BCHW)
        return Field.decode(self, x_BCHW)


@pytest.mark.parametrize("search", SEARCHES, ids=str)
def test_looks_and_estimates_are_decoded_small_and_images_in_full(search: Search) -> None:
    model = SmallField()
    # in batches of one, none of which is filled up
    found = searching(search, model=model, batch=1)(*samples_and_draw())
    plan = search.plan(38, 5)
    num_in_full = {"BestOfN": 7, "Halving": HALVING.rounds(38, 5)[-1][1]}.get(type(search).__name__, 1)
    assert model.num_full == 6 * num_in_full
    assert model.num_small == 6 * (plan.scored - num_in_full)
    assert found.cost.scored == 6 * plan.scored
