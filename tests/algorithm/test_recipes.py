"""The YAML recipes: every one composes with every piece of every group, and holds the published values."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from fastgrpo.algorithm.advantage import GroupAdvantage
from fastgrpo.algorithm.algorithm import Algorithm
from fastgrpo.algorithm.dynamics import CPS, ODE, DanceSDE, FlowSDE
from fastgrpo.algorithm.noise import GaussianNoise, SharedNoise
from fastgrpo.algorithm.objective.clipped_surrogate import ClippedSurrogate
from fastgrpo.algorithm.objective.flow_dppo import FlowDPPO
from fastgrpo.algorithm.objective.grpo_guard import GRPOGuard
from fastgrpo.algorithm.objective.matching_ratio import MatchingRatio
from fastgrpo.algorithm.objective.nft import NFT
from fastgrpo.algorithm.objective.weighted_regression import WeightedRegression
from fastgrpo.algorithm.retries import Retries
from fastgrpo.algorithm.schedule import FewSteps, LinearSchedule, SD3Schedule
from fastgrpo.algorithm.search import EliteSearch
from fastgrpo.algorithm.step_search import StepSearch
from fastgrpo.algorithm.timesteps import AllButLast, DrawnTimes, RandomSubset, RandomWindow, SlidingWindow

CONFIGS = Path(__file__).parents[2] / "configs"
CHOICES = ("schedule", "noise", "dynamics", "timesteps", "advantage", "objective")
RECIPES = sorted(path.stem for path in (CONFIGS / "algorithm").glob("*.yaml"))
# given times have as many steps as they are, whatever a recipe says
GIVEN = ("given", "qwen_image_21_turbo")
PIECES = {
    choice: [path.stem for path in (CONFIGS / "algorithm" / choice).glob("*.yaml") if path.stem not in GIVEN]
    for choice in CHOICES
}
FLOW_GRPO = (
    SD3Schedule(10), GaussianNoise(), FlowSDE(0.7), AllButLast(), GroupAdvantage("global"),
    ClippedSurrogate(1e-4, 0.04),
)  # fmt: skip
PAPER = EliteSearch(rounds=3, candidates=8, elites=3, estimate_steps=1, start="mean", project="none", std_floor=0.0)
# a rollout in few steps that stores nothing, and images that are noised again
IMAGES = (FewSteps(6), GaussianNoise(), ODE(), DrawnTimes(), GroupAdvantage("global"))
PUBLISHED = {
    "flow_grpo_guard": (*FLOW_GRPO[:5], GRPOGuard()),
    "flow_dppo": (*FLOW_GRPO[:5], FlowDPPO()),
    "chunk_grpo": (*FLOW_GRPO[:5], ClippedSurrogate(1e-4, 0.0, (2, 3, 4))),
    # published with plain noise alone
    "nft": (IMAGES[0], Retries(), *IMAGES[2:], NFT()),
    "awm": (*IMAGES, MatchingRatio(clip_range=1.0, time_power=1.0, proximal_coef=2.0)),
    "v_grpo": (*IMAGES[:3], DrawnTimes(is_shared=True), IMAGES[4], MatchingRatio(clip_range=0.05, proximal_coef=2.0)),
    "rwr": (*IMAGES, WeightedRegression(proximal_coef=2.0)),
    "flow_grpo": FLOW_GRPO,
    "smart_grpo": (
        SD3Schedule(10), EliteSearch(mix=0.75), CPS(0.5), RandomWindow(3, 0, 5), GroupAdvantage("global"),
        ClippedSurrogate(1e-5, 0.0),
    ),
    "smart_grpo_paper": (FLOW_GRPO[0], PAPER, *FLOW_GRPO[2:]),
    "smart_grpo_paper_step": (
        FLOW_GRPO[0], StepSearch(rounds=3, candidates=1, shares_start=True, take="mean", correction="none"),
        *FLOW_GRPO[2:],
    ),
    "flow_grpo_fast": (
        SD3Schedule(10), GaussianNoise(), CPS(0.8), RandomWindow(3, 0, 5), GroupAdvantage("global"),
        ClippedSurrogate(1e-5, 0.0),
    ),
    "mix_grpo": (
        LinearSchedule(25, shift=3.0), SharedNoise(), FlowSDE(0.7), SlidingWindow(4, 1, 25), GroupAdvantage("group"),
        ClippedSurrogate(1e-4, 0.0),
    ),
    "dance_grpo": (
        LinearSchedule(16, shift=3.0), SharedNoise(), DanceSDE(0.3), RandomSubset(0.6), GroupAdvantage("group"),
        ClippedSurrogate(1e-4, 0.0),
    ),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _hydra():
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        yield


def algorithm(recipe, *overrides):
    # some times depend on the resolution of the model
    return compose("train", overrides=["model=shapes", f"algorithm={recipe}", *overrides]).algorithm


def test_every_recipe_is_described_here():
    assert set(RECIPES) == set(PUBLISHED)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_holds_its_published_values(recipe):
    published = instantiate(algorithm(recipe))
    assert isinstance(published, Algorithm)
    assert tuple(getattr(published, choice) for choice in CHOICES) == PUBLISHED[recipe]


@pytest.mark.parametrize("recipe", RECIPES)
def test_any_piece_can_be_swapped_into_a_recipe(recipe):
    # two swaps, of which one is to another piece, and all together to every piece
    for i in range(2):
        place = 2 * RECIPES.index(recipe) + i
        pieces = {choice: names[place % len(names)] for choice, names in PIECES.items()}
        config = algorithm(recipe, *(f"algorithm/{choice}={name}" for choice, name in pieces.items()))
        # fields that a recipe sets for the piece it names would be refused by another class
        swapped = instantiate(config)
        for choice in CHOICES:
            assert config[choice]["_target_"].endswith(f".{type(getattr(swapped, choice)).__name__}")


def test_a_piece_and_its_fields_can_be_overridden_together():
    config = algorithm("flow_grpo", "algorithm/noise=elite", "algorithm.noise.rounds=2", "algorithm.noise.mix=0.5")
    assert instantiate(config.noise) == EliteSearch(rounds=2, mix=0.5)
    assert instantiate(algorithm("flow_grpo", "algorithm/noise=elite_step").noise) == StepSearch()


@pytest.mark.parametrize("path", sorted((CONFIGS / "algorithm").rglob("*.yaml")), ids=lambda path: path.stem)
def test_a_config_opens_with_one_comment(path):
    first, second = path.read_text().splitlines()[:2]
    assert first.startswith("# ")
    assert not second.startswith("#")
