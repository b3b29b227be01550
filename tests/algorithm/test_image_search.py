"""Searches at sampling: what they plan, by hand, and that they keep to it."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastgrpo.algorithm.image_search import (
    DEFAULT_SEARCH,
    BestOfEstimates,
    BestOfN,
    Elite,
    Halving,
    NoSearch,
    planned,
)
from fastgrpo.algorithm.making import Found, Search, best_of
from fastgrpo.algorithm.noise import NoiseDraw
from fastgrpo.algorithm.slots import Slots
from fastgrpo_kernels import philox_normal

SHAPE = (1, 2, 2)
SEARCHES: list[Search] = [NoSearch(), BestOfN(), BestOfEstimates(), Elite(), Halving(), Halving(looks=(0.3,), keep=0.2)]
HALVING = Halving(looks=(0.5, 0.7), keep=0.5)


class Counting:
    """``Making`` of two images whose scores are random; counts what is asked of it."""

    def __init__(self, velocities: int, num_steps: int) -> None:
        self.slots = Slots(NoiseDraw(3, [4, 9], 1, SHAPE), stream=0)
        self.velocities, self.num_steps = velocities, num_steps
        self.taken = self.scored = 0
        self._generator = torch.Generator().manual_seed(0)

    def estimates(self, noise_SKCHW: Tensor, num_steps: int) -> Tensor:
        return self._asked(noise_SKCHW, num_steps, is_scored=True)

    def run(self, x_SKCHW: Tensor, steps: range) -> Tensor:
        self._asked(x_SKCHW, len(steps), is_scored=False)
        return x_SKCHW

    def look(self, x_SKCHW: Tensor, step: int) -> tuple[Tensor, Tensor]:
        return x_SKCHW, self._asked(x_SKCHW, 1, is_scored=True)

    def best(self, x_SKCHW: Tensor, steps: range) -> Found:
        scores_SK = self._asked(x_SKCHW, len(steps), is_scored=True)
        return Found(x_SKCHW[:, 0], scores_SK[:, 0])

    def _asked(self, x_SKCHW: Tensor, num_steps: int, *, is_scored: bool) -> Tensor:
        assert x_SKCHW.shape[:1] + x_SKCHW.shape[2:] == (2, *SHAPE)
        self.taken += x_SKCHW.shape[1] * num_steps
        self.scored += x_SKCHW.shape[1] * is_scored
        return torch.rand(x_SKCHW.shape[:2], generator=self._generator)


@pytest.mark.parametrize(
    ("search", "velocities", "num_steps", "plan"),
    [
        (NoSearch(), 64, 10, (1, 10, 1)),
        (BestOfN(), 64, 10, (6, 60, 6)),
        (BestOfN(), 19, 10, (1, 10, 1)),
        # 10 for the image, 54 for estimates of 4
        (BestOfEstimates(), 64, 10, (13, 62, 14)),
        (BestOfEstimates(), 18, 10, (2, 18, 3)),
        # one noise need not be estimated
        (BestOfEstimates(), 17, 10, (1, 10, 1)),
        (BestOfEstimates(estimate_steps=1), 64, 10, (54, 64, 55)),
        (Elite(), 64, 10, (13, 62, 14)),
        (Elite(), 10, 10, (1, 10, 1)),
        # rounds of 5, 2 and 3 steps: 9, 4 and 2 noises take 59, one more in the last 62, one in the second 64
        (HALVING, 64, 10, (9, 64, 9 + 5 + 3)),
        # 3, round(1.5) = 2 and 1 take 22, 2, 1 and 1 take 15, and one more in the last 18
        (HALVING, 19, 10, (2, 17, 2 + 1)),
        (HALVING, 10, 10, (1, 10, 1)),
        # looks after 1 of 2 steps: 9 noises and, of round(4.5) that pay for themselves, 4
        (HALVING, 13, 2, (9, 13, 9 + 4)),
        # nothing to look at: the best of N
        (HALVING, 7, 1, (7, 7, 7)),
    ],
    ids=str,
)
def test_the_plan_of_a_budget_by_hand(
    search: Search, velocities: int, num_steps: int, plan: tuple[int, int, int]
) -> None:
    found = search.plan(velocities, num_steps)
    assert (found.candidates, found.velocities, found.scored) == plan


@pytest.mark.parametrize("search", SEARCHES, ids=str)
def test_a_search_does_what_it_plans_and_never_more_than_it_may(search: Search) -> None:
    for num_steps in (4, 5, 10):
        for velocities in range(num_steps, 6 * num_steps + 7):
            making = Counting(velocities, num_steps)
            search(making)
            plan = search.plan(velocities, num_steps)
            assert (making.taken, making.scored) == (plan.velocities, plan.scored), (velocities, num_steps)
            assert num_steps <= plan.velocities <= velocities
            # what is left over would not buy another candidate, of which an estimate has two at the least
            assert velocities - plan.velocities < 2 * num_steps or isinstance(search, NoSearch)


def test_rounds_of_an_elite_search_by_hand() -> None:
    search = Elite(rounds=3)
    # the plain noise, and what does not divide
    assert [search.in_rounds(num) for num in (1, 4, 5, 8, 9, 13, 14, 16)] == [
        (1, 0, 0),
        (4, 0, 0),
        (1, 1, 4),
        (1, 1, 7),
        (1, 2, 4),
        (1, 3, 4),
        (2, 3, 4),
        (1, 3, 5),
    ]


def test_halving_lets_as_many_go_on_as_there_is_budget_for() -> None:
    assert Halving(looks=(0.5,), keep=0.25).rounds(100, 10) == [(range(5), 16), (range(5, 10), 4)]
    assert HALVING.rounds(64, 10) == [(range(5), 9), (range(5, 7), 5), (range(7, 10), 3)]


def test_candidates_are_functions_of_their_ids() -> None:
    """Number 0 is the plain noise; the others are no neighbours' and are the same beside whatever else is made."""
    ids, places = [7, 7, 2], [1, 2, 0]
    draw = NoiseDraw(5, [7, 2], 3, SHAPE, rows=(1, 2, 3))
    slots = Slots(draw, stream=3000)
    found = slots.noises(4)
    numel = math.prod(SHAPE)
    for s, (prompt_id, place) in enumerate(zip(ids, places, strict=True)):
        prompt = torch.tensor([prompt_id])
        plain = philox_normal(5, 3000, prompt, torch.tensor([place]), numel)
        others = philox_normal(5, 5000, prompt, torch.tensor([place + 65536 * k for k in (1, 2, 3)]), numel)
        expected = torch.cat([plain, others], dim=1).view(4, *SHAPE)
        assert torch.equal(found[s], expected)
    assert torch.equal(found[:, 0], draw.starts(3000))
    assert torch.equal(found[:, :1], slots.noises(1))
    assert found.flatten().unique().numel() == found.numel()
    # a part of them, among more images of each prompt
    alone = Slots(NoiseDraw(5, [2], 1, SHAPE), stream=3000)
    assert torch.equal(alone.noises(2)[0], found[2, :2])


def test_of_equal_scores_the_first_candidates_go_on_in_their_order() -> None:
    x_SKCHW = torch.arange(5.0).view(1, 5, 1, 1, 1)
    kept = best_of(x_SKCHW, torch.tensor([[1.0, 0.0, 2.0, 1.0, 2.0]]), 3)
    assert kept.flatten().tolist() == [0.0, 2.0, 4.0]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Halving(looks=(0.5, 0.5)), r"search\.looks must rise between 0 and 1"),
        (lambda: Halving(looks=(0.0, 0.5)), r"search\.looks must rise"),
        (lambda: Halving(looks=()), r"search\.looks must rise"),
        (lambda: Halving(keep=1.0), r"search\.keep must lie between 0 and 1"),
        (lambda: Halving(keep=0.0), r"search\.keep must lie between 0 and 1"),
        (lambda: BestOfEstimates(estimate_steps=0), r"search\.estimate_steps must be at least 1"),
        (lambda: Elite(estimate_steps=0), r"search\.estimate_steps must be at least 1"),
        (lambda: Elite(rounds=0), r"search\.rounds must be at least 1"),
        (lambda: Elite(elite_share=0.0), r"search\.elite_share must lie in"),
        (lambda: Elite(std_floor=-0.1), r"search\.std_floor must lie in"),
        (
            lambda: BestOfEstimates(estimate_steps=5).plan(64, 4),
            r"search\.estimate_steps must be at most num_steps = 4",
        ),
        (lambda: planned(BestOfN(), budget=9, num_steps=10), "raise it to at least 10"),
        (lambda: planned(BestOfN(), budget=19, num_steps=10, cost=2), "two a step since it is guided.* at least 20"),
        (lambda: planned(BestOfN(), budget=-1, num_steps=10), "budget=-1 is too small"),
        (lambda: Slots(NoiseDraw(0, [0], 65537, SHAPE), 0), "at most 65536 images of a prompt"),
        (lambda: Slots(NoiseDraw(0, [0], 1, SHAPE), 0).noises(32769), "at most 32768 candidates"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_work_is_refused(make, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_guidance_takes_two_evaluations() -> None:
    assert planned(BestOfN(), budget=64, num_steps=10, cost=2).candidates == 3
    assert planned(BestOfN(), budget=20, num_steps=10, cost=2).candidates == 1


def test_one_look_may_be_written_as_a_number() -> None:
    looks: object = 0.4
    assert Halving(looks=looks) == Halving(looks=(0.4,))  # type: ignore[arg-type]


def test_the_default_search_is_that_of_the_config() -> None:
    from fastgrpo.config import load_config
    from fastgrpo.parts import read_search

    assert read_search(load_config("sample", ["search=true", "prompt=a"])) == DEFAULT_SEARCH
    defaults = {"best_of_n": BestOfN(), "best_of_estimates": BestOfEstimates(), "elite": Elite(), "halving": Halving()}
    options = {path.stem for path in (Path(__file__).parents[2] / "configs" / "search").glob("*.yaml")}
    assert options == {*defaults, "none"}
    for option, search in defaults.items():
        assert read_search(load_config("evaluate", [f"search={option}"])) == search
    for words in ([], ["search=false"], ["search=none"]):
        assert read_search(load_config("sample", [*words, "prompt=a"])) == NoSearch()
