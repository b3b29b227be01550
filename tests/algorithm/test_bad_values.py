"""Each piece refuses a value that it cannot have by the full key, the value and what to give in its place."""

import math
import re
from typing import Any

import pytest

from fastgrpo.algorithm.advantage import GroupAdvantage
from fastgrpo.algorithm.dynamics import CPS, DanceSDE, FlowSDE
from fastgrpo.algorithm.objective.clipped_surrogate import ClippedSurrogate
from fastgrpo.algorithm.objective.flow_dppo import FlowDPPO
from fastgrpo.algorithm.objective.grpo_guard import GRPOGuard
from fastgrpo.algorithm.objective.matching_ratio import MatchingRatio
from fastgrpo.algorithm.objective.nft import NFT
from fastgrpo.algorithm.objective.weighted_regression import WeightedRegression
from fastgrpo.algorithm.schedule import FluxSchedule, LinearSchedule, SD3Schedule
from fastgrpo.algorithm.search import BestOfK, EliteSearch, RandomSearch
from fastgrpo.algorithm.timesteps import AllButLast, DrawnTimes, RandomSubset, RandomWindow, SlidingWindow

# the piece, its values, what is said after "algorithm."
REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    *(
        (piece, {"num_steps": 0}, "schedule.num_steps must be at least 1, got 0")
        for piece in (LinearSchedule, SD3Schedule)
    ),
    *(
        (LinearSchedule, {"num_steps": 4, "shift": shift}, f"schedule.shift must be positive and finite, got {shift}")
        for shift in (0.0, -1.0, math.nan, math.inf)
    ),
    (SD3Schedule, {"num_steps": 4, "shift": -1}, "schedule.shift must be positive and finite, got -1"),
    (FluxSchedule, {"num_steps": 0, "resolution": 512}, "schedule.num_steps must be at least 1, got 0"),
    (
        FluxSchedule,
        {"num_steps": 4, "resolution": 512, "terminal": 1.0},
        "schedule.terminal must lie in [0, 1), got 1.0",
    ),
    (
        FluxSchedule,
        {"num_steps": 4, "resolution": 512, "max_tokens": 256},
        "schedule.base_tokens must be positive and less than max_tokens, got 256 and 256",
    ),
    (FluxSchedule, {"num_steps": 4, "resolution": 8}, "schedule.resolution must be at least 16 pixels, got 8"),
    (
        FluxSchedule,
        {"num_steps": 4, "resolution": [512, 8]},
        "schedule.resolution must be at least 16 pixels, got [512, 8]",
    ),
    (
        FluxSchedule,
        {"num_steps": 4, "resolution": [512]},
        "schedule.resolution must be a whole number or [height, width]",
    ),
    (
        FluxSchedule,
        {"num_steps": 4, "resolution": 512, "base_shift": 800.0},
        "schedule.base_shift must lie in [-10, 10], got 800.0",
    ),
    (
        FluxSchedule,
        {"num_steps": 4, "resolution": 512, "max_shift": math.nan},
        "schedule.max_shift must lie in [-10, 10], got nan",
    ),
    *(
        (
            piece,
            {"noise_level": value},
            f"dynamics.noise_level must be positive, got {value}; use algorithm/dynamics=ode",
        )
        for piece in (FlowSDE, DanceSDE, CPS)
        for value in (0.0, -0.5, math.nan)
    ),
    *(
        (piece, {"noise_level": math.inf}, "dynamics.noise_level must be finite, got inf")
        for piece in (FlowSDE, DanceSDE)
    ),
    (CPS, {"noise_level": 1.5}, "dynamics.noise_level of CPS must be at most 1, got 1.5"),
    (RandomWindow, {"size": 0}, "timesteps.size must be at least 1, got 0"),
    (RandomWindow, {"low": -1}, "timesteps.low must be at least 0, got -1"),
    (RandomWindow, {"size": 3, "low": 3}, "timesteps.size 3 does not fit into [low, high) = [3, 5)"),
    *(
        (SlidingWindow, {field: 0}, f"timesteps.{field} must be at least 1, got 0")
        for field in ("size", "stride", "every")
    ),
    *(
        (RandomSubset, {"share": share}, f"timesteps.share must lie in (0, 1], got {share}")
        for share in (0, 1.5, math.nan)
    ),
    (DrawnTimes, {"per_image": 0}, "timesteps.per_image must be at least 1, got 0"),
    *(
        (DrawnTimes, {"shift": shift}, f"timesteps.shift must be positive and finite, got {shift}; 1 draws all times")
        for shift in (0.0, -1.0, math.nan, math.inf)
    ),
    *(
        (
            DrawnTimes,
            {"low": low, "high": high},
            f"timesteps.low and high must be a range within [0, 1], got [{low}, {high}]; use low=0 and high=1",
        )
        for low, high in ((0.5, 0.5), (0.8, 0.2), (-0.1, 1.0), (0.0, 1.5), (math.nan, 1.0), (0.0, math.nan))
    ),
    *(
        (NFT, {"beta": beta}, f"objective.beta must be positive and finite, got {beta}: the loss divides by it; 1 and")
        for beta in (0.0, -1.0, math.nan, math.inf)
    ),
    *(
        (NFT, {"max_advantage": a_max}, f"objective.max_advantage must be positive and finite, got {a_max}; 5 is")
        for a_max in (0.0, -1.0, math.nan, math.inf)
    ),
    *(
        (MatchingRatio, {"clip_range": value}, f"objective.clip_range must be positive, got {value}; .05 to 1 suits")
        for value in (0.0, -1.0, math.nan, math.inf)
    ),
    *(
        (piece, {key: value}, f"objective.{key} must be finite and not negative, got {value}; ")
        for piece, key in (
            (NFT, "kl_coef"),
            (MatchingRatio, "kl_coef"),
            (MatchingRatio, "proximal_coef"),
            (MatchingRatio, "time_power"),
            (WeightedRegression, "kl_coef"),
            (WeightedRegression, "proximal_coef"),
        )
        for value in (-1.0, math.nan, math.inf)
    ),
    (GroupAdvantage, {"std": "batch"}, "advantage.std must be group, global or none, got 'batch'"),
    *(
        (GroupAdvantage, {"eps": eps}, f"advantage.eps must be positive and finite, got {eps}")
        for eps in (0, math.nan, math.inf)
    ),
    *((GroupAdvantage, {"clamp": clamp}, f"advantage.clamp must be positive, got {clamp}") for clamp in (0, math.nan)),
    *(
        (piece, {"clip_range": value}, f"objective.clip_range must lie in (0, 1), got {value}")
        for piece in (ClippedSurrogate, GRPOGuard)
        for value in (0.0, 1.0, math.nan)
    ),
    *(
        (piece, {"kl_coef": value}, f"objective.kl_coef must be finite and not negative, got {value}")
        for piece in (ClippedSurrogate, GRPOGuard, FlowDPPO)
        for value in (-1, math.nan, math.inf)
    ),
    *(
        (
            ClippedSurrogate,
            {"chunk_sizes": sizes},
            f"objective.chunk_sizes must be positive numbers, got {sizes}",
        )
        for sizes in ([], [0], [2, -1])
    ),
    *(
        (FlowDPPO, {"max_divergence": value}, f"objective.max_divergence must be positive and finite, got {value}")
        for value in (0.0, -1.0, math.nan, math.inf)
    ),
    *(
        (piece, {"candidates": 0}, "noise.candidates must be at least 1, got 0; use algorithm/noise=gaussian")
        for piece in (EliteSearch, BestOfK, RandomSearch)
    ),
    *(
        (piece, {"estimate_steps": 0}, "noise.estimate_steps must be at least 1, got 0")
        for piece in (EliteSearch, BestOfK, RandomSearch)
    ),
    # the next stream of noise is that of the first stochastic step
    *((piece, {"rounds": 999}, "noise.rounds must be at most 998, got 999") for piece in (EliteSearch, RandomSearch)),
    (EliteSearch, {"rounds": 0}, "noise.rounds must be at least 1, got 0"),
    (EliteSearch, {"candidates": 4, "elites": 5}, "noise.elites must be at most algorithm.noise.candidates = 4, got 5"),
    (EliteSearch, {"start": "median"}, "noise.start must be one of mean, elites, contrast, got 'median'"),
    (BestOfK, {"start": "mean"}, "noise.start must be one of shared, distinct, got 'mean'"),
    (EliteSearch, {"weights": "equal"}, "noise.weights must be one of uniform, rank, softmax, got 'equal'"),
    (EliteSearch, {"temperature": 0.0}, "noise.temperature must be positive and finite, got 0.0"),
    (EliteSearch, {"project": "ball"}, "noise.project must be one of sphere, none, best, got 'ball'"),
    (EliteSearch, {"project": "best"}, "noise.project=best gives one noise a group, got start=elites; use start=mean"),
    (EliteSearch, {"fresh": True, "start": "mean"}, "noise.fresh draws distinct noises, got start=mean"),
    (EliteSearch, {"mix": 1.1}, "noise.mix must lie in [0, 1], got 1.1"),
    (EliteSearch, {"anneal": math.nan}, "noise.anneal must lie in [0, 1], got nan"),
    (EliteSearch, {"momentum": 1.0}, "noise.momentum must lie in [0, 1), got 1.0"),
    *(
        (EliteSearch, {"std_floor": value}, f"noise.std_floor must be finite and not negative, got {value}")
        for value in (-1.0, math.nan)
    ),
]


@pytest.mark.parametrize(("piece", "values", "message"), REFUSED, ids=lambda v: getattr(v, "__name__", str(v)[:50]))
def test_a_bad_value_is_refused_by_its_full_key(piece: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(f"algorithm.{message}")):
        piece(**values)


@pytest.mark.parametrize(
    ("choose", "message"),
    [
        (RandomWindow(3, 0, 5), "timesteps.high must be at most num_steps - 1 = 3, got 5; lower high or raise"),
        (SlidingWindow(4), "timesteps.size must be at most num_steps - 1 = 3, got 4; lower size or raise"),
    ],
    ids=["RandomWindow", "SlidingWindow"],
)
def test_a_window_that_the_schedule_has_no_room_for_is_refused(choose: Any, message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(f"algorithm.{message} algorithm.schedule.num_steps")):
        choose(4, 0, 0)


def test_a_single_step_cannot_be_trained() -> None:
    with pytest.raises(ValueError, match=r"^algorithm\.schedule\.num_steps must be at least 2 in training, got 1"):
        AllButLast()(1, 0, 0)
