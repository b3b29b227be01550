"""What an algorithm is checked for as a whole, before there is a model."""

import re
from dataclasses import replace
from typing import Any

import pytest

from fastgrpo.algorithm.advantage import GroupAdvantage
from fastgrpo.algorithm.algorithm import Algorithm
from fastgrpo.algorithm.dynamics import CPS, ODE, DanceSDE, FlowSDE, StepCoefficients
from fastgrpo.algorithm.noise import GaussianNoise, SharedNoise
from fastgrpo.algorithm.objective.clipped_surrogate import ClippedSurrogate
from fastgrpo.algorithm.objective.nft import NFT
from fastgrpo.algorithm.schedule import FewSteps, LinearSchedule, SD3Schedule
from fastgrpo.algorithm.search import BestOfK, EliteSearch, RandomSearch
from fastgrpo.algorithm.timesteps import AllButLast, DrawnTimes, RandomWindow, SlidingWindow

FLOW_GRPO = Algorithm(
    schedule=SD3Schedule(10),
    noise=GaussianNoise(),
    dynamics=FlowSDE(),
    timesteps=AllButLast(),
    advantage=GroupAdvantage(),
    objective=ClippedSurrogate(),
)
IMAGES: dict[str, Any] = {"dynamics": ODE(), "timesteps": DrawnTimes(), "objective": NFT()}
RUN = {"evaluation_steps": 40, "group_size": 24, "iterations": 100, "seed": 42}


def always(*steps: int) -> Any:
    return lambda num_steps, iteration, seed: steps


def late(num_steps: int, iteration: int, seed: int) -> tuple[int, ...]:
    """Goes wrong in its hundredth iteration."""
    return (0,) if iteration < 99 else (num_steps - 1,)


def negative(grid: Any, step: int) -> StepCoefficients:
    return StepCoefficients(1.0, -0.1, std=-0.1, kl_weight=1.0)


@pytest.mark.parametrize(
    "pieces",
    [
        {},
        {"schedule": LinearSchedule(25, 3.0), "timesteps": SlidingWindow(4, 1, 25), "dynamics": DanceSDE()},
        {"noise": EliteSearch(estimate_steps=10), "timesteps": RandomWindow(3, 0, 5), "dynamics": CPS()},
        # distinct noises are asked of neither
        {"noise": EliteSearch(candidates=8, elites=3, start="mean")},
        {"noise": BestOfK(candidates=2)},
        # one step leads to an image
        {**IMAGES, "schedule": FewSteps(1)},
        # steps that would fail if they were trained
        {"dynamics": CPS(), "timesteps": always(0, 8)},
    ],
    ids=lambda pieces: " ".join(pieces) or "as it comes",
)
def test_what_can_be_trained_passes(pieces: dict[str, Any]) -> None:
    replace(FLOW_GRPO, **pieces).check(**RUN)


@pytest.mark.parametrize(
    ("pieces", "run", "message"),
    [
        ({"schedule": LinearSchedule(1001)}, {}, "algorithm.schedule.num_steps must be at most 1000, got 1001"),
        ({"schedule": SD3Schedule(1)}, {}, "algorithm.schedule.num_steps must be at least 2 in training, got 1"),
        # in double precision all but the last times are 1
        ({"schedule": LinearSchedule(3, 1e20)}, {}, "algorithm.schedule must fall from 1 to 0 and gives 1, 1, 1, 0"),
        ({}, {"evaluation_steps": 0}, "evaluate.num_steps must be at least 1, got 0"),
        (
            {"timesteps": RandomWindow(3, 0, 5), "schedule": SD3Schedule(4)},
            {},
            "algorithm.timesteps.high must be at most num_steps - 1 = 3, got 5",
        ),
        ({"timesteps": always()}, {}, "algorithm.timesteps chose the steps () in iteration 0"),
        ({"timesteps": always(3, 1)}, {}, "algorithm.timesteps chose the steps (3, 1) in iteration 0"),
        ({"timesteps": always(-1, 1)}, {}, "algorithm.timesteps chose the steps (-1, 1) in iteration 0"),
        ({"timesteps": always(1, 1)}, {}, "algorithm.timesteps chose the steps (1, 1) in iteration 0"),
        (
            {"timesteps": late},
            {},
            "algorithm.timesteps chose the steps (9,) in iteration 99; they must ascend and lie in [0, 8]",
        ),
        (
            {"dynamics": ODE()},
            {},
            "algorithm.dynamics adds no noise on step 0, from t = 1 to 0.9601, which is trained; use "
            "algorithm/dynamics=flow_sde",
        ),
        (
            {**IMAGES, "dynamics": CPS()},
            {},
            "algorithm.dynamics is CPS, but algorithm.objective NFT learns from images alone and needs no noise on the "
            "way to them; use algorithm/dynamics=ode",
        ),
        (
            {**IMAGES, "timesteps": RandomWindow()},
            {},
            "algorithm.timesteps is RandomWindow, but algorithm.objective NFT learns from images, noised again at "
            "drawn times, and no step would be trained; use algorithm/timesteps=drawn",
        ),
        *(
            (
                {**IMAGES, "noise": noise},
                {},
                "algorithm.noise gives all samples of a group one start noise, but algorithm.objective NFT learns from "
                "images, which are then all the same and none better than another; use algorithm/noise=gaussian",
            )
            for noise in (SharedNoise(), EliteSearch(start="mean"), BestOfK(start="shared"))
        ),
        (
            {"timesteps": DrawnTimes()},
            {},
            "algorithm.timesteps draws times for images, but algorithm.objective ClippedSurrogate learns from "
            "stochastic steps of the rollout; use algorithm/timesteps=all_but_last, or algorithm/objective=nft",
        ),
        ({"dynamics": DanceSDE(1e200)}, {}, "algorithm.dynamics fails on step 0, from t = 1 to 0.9601"),
        # 1 / s^2 is more than float32 holds
        ({"dynamics": DanceSDE(1e-20)}, {}, "algorithm.dynamics gives c_x, c_v, std, kl_weight = (1.0, "),
        ({"dynamics": negative}, {}, "algorithm.dynamics gives c_x, c_v, std, kl_weight = (1.0, -0.1, -0.1, 1.0)"),
        *(
            (
                {"noise": search(estimate_steps=11)},
                {},
                "algorithm.noise.estimate_steps must be at most algorithm.schedule.num_steps = 10, got 11",
            )
            for search in (EliteSearch, BestOfK, RandomSearch)
        ),
        (
            {"noise": EliteSearch(candidates=8, elites=4, rounds=2)},
            {},
            "algorithm.noise.start=elites hands out 24 distinct noises of only rounds * candidates = 16; raise "
            "algorithm.noise.candidates or lower train.group_size",
        ),
        (
            {"noise": RandomSearch(candidates=23)},
            {},
            "algorithm.noise.start=distinct hands out 24 distinct noises of only rounds * candidates = 23",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_trained_is_refused_before_anything_is_made(
    pieces: dict[str, Any], run: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        replace(FLOW_GRPO, **pieces).check(**RUN | run)


def test_the_grids_of_evaluation_and_of_a_search_by_hand() -> None:
    assert FLOW_GRPO.evaluation_grid(40) == SD3Schedule(40)()
    # 3 u / (1 + 2 u) of evenly spaced u: each step is a real one
    assert FLOW_GRPO.estimate_grid(4) == pytest.approx((1, 0.9, 0.75, 0.5, 0))
    assert replace(FLOW_GRPO, schedule=LinearSchedule(10)).estimate_grid(2) == pytest.approx((1, 0.5, 0))


def test_what_is_kept_for_the_updates_by_hand() -> None:
    # x, x_next and a branch of guidance of 9 steps, however often they are replayed
    assert FLOW_GRPO.kept(1, two_branches=True) == FLOW_GRPO.kept(4, two_branches=True) == (18, 9)
    # x_0, and the old policy at each of 2 draws of 4 updates
    images = replace(FLOW_GRPO, **IMAGES | {"timesteps": DrawnTimes(per_image=2)})
    assert images.kept(4, two_branches=False) == (1, 8)
