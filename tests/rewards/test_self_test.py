"""Golden scores: what stops a run before it begins, and what they are compared with."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastgrpo.compile.networks import Eager
from fastgrpo.config import load_config
from fastgrpo.pieces import build
from fastgrpo.rewards.clip_score import clip_score
from fastgrpo.rewards.golden import GoldenSet, golden_set
from fastgrpo.rewards.jpeg import JpegSize
from fastgrpo.rewards.ocr import Ocr
from fastgrpo.rewards.reward import Reward, RewardError
from fastgrpo.rewards.scoring import Scoring
from fastgrpo.rewards.self_test import SHIPPED, GoldenScores, compare, golden_scores, identity, record, self_test
from fastgrpo.rewards.shapes import ShapesReward
from fastgrpo.rewards.weighted_sum import Rewards
from fastgrpo.shapes.world import IMAGE_SIZE

TESTED = GoldenScores(identity="it", scores=[0.0, 1.0, 2.0, 4.0], tolerance=0.05)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def rewards_of(reward: Reward, **settings: object) -> Rewards:
    scoring = Scoring(retries=0)
    return Rewards(terms={"mine": reward}, weights={"mine": 1.0}, scoring=scoring, **settings)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Brightness:
    """A piece with a setting."""

    scale: float = 1.0

    def __call__(self, images_BCHW: Tensor, prompts: list[str]) -> Tensor:
        return self.scale * images_BCHW.mean(dim=(1, 2, 3))


def constant(images_BCHW: Tensor, prompts: list[str]) -> Tensor:
    return torch.full((len(images_BCHW),), 0.25)


def zeros(images_BCHW: Tensor, prompts: list[str]) -> Tensor:
    return torch.zeros(len(images_BCHW))


def some_nan(images_BCHW: Tensor, prompts: list[str]) -> Tensor:
    return torch.where(torch.arange(len(images_BCHW)) == 2, float("nan"), 1.0)


def one_short(images_BCHW: Tensor, prompts: list[str]) -> Tensor:
    return torch.arange(len(images_BCHW) - 1)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (constant, r"'mine' answered 0.25 for all 8 golden pairs \(scenes\)"),
        (zeros, r"'mine' answered 0 for all 8 golden pairs \(scenes\)"),
        (some_nan, "'mine' answered nan for image 2"),
        (one_short, r"'mine' answered shape \[7\] for 8 images"),
    ],
)
def test_a_reward_that_can_teach_nothing_is_refused(reward: Reward, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        golden_scores(rewards_of(reward), "cpu")


def test_watched_rewards_are_tried_as_well() -> None:
    with pytest.raises(RewardError, match="'idle' answered 0 for all"):
        golden_scores(rewards_of(Brightness(), watch={"idle": zeros}), "cpu")


def test_golden_scenes_are_what_the_verifier_makes_of_them() -> None:
    golden = golden_set("scenes")
    assert golden.images_BCHW.shape == (8, 3, IMAGE_SIZE, IMAGE_SIZE)
    # five as prompted, then a wrong color, one object of two, and noise
    assert ShapesReward(strict=True)(golden.images_BCHW, golden.prompts).tolist() == [1, 1, 1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize(
    "reward",
    [
        ShapesReward(),
        ShapesReward(strict=True),
        JpegSize(),
        JpegSize(maximize=True),
        clip_score(path="shapes", backend=Eager()),
        Ocr(threads=1),
    ],
    ids=["shapes", "strict", "jpeg", "jpeg maximized", "clip", "ocr"],
)
def test_the_rewards_of_this_package_are_on_record_and_score_so(reward: Reward) -> None:
    expected = json.loads(SHIPPED.read_text())[identity(reward)]
    tested = golden_scores(rewards_of(reward), "cpu")["mine"]
    assert tested.scores == pytest.approx(expected, abs=1e-4 * tested.spread)


def test_half_precision_stays_within_its_wider_tolerance_of_the_record() -> None:
    tested = golden_scores(rewards_of(clip_score(path="shapes", backend=Eager(precision="bfloat16"))), "cpu")["mine"]
    expected = json.loads(SHIPPED.read_text())[tested.identity]
    assert tested.tolerance == 0.05
    assert 0 < compare("clip", tested, expected, "the record") < 0.05


def test_a_record_holds_later_runs_to_it(cache: Path) -> None:
    before = self_test(rewards_of(Brightness()), "cpu")["mine"]
    path = record(before)
    assert cache in path.parents
    assert self_test(rewards_of(Brightness()), "cpu")["mine"] == before
    changed = replace(before, scores=[score + 0.1 for score in before.scores])
    record(changed)
    with pytest.raises(RewardError, match=rf"'mine' scores golden pair \d .*, but {path} says .*doctor record=true"):
        self_test(rewards_of(Brightness()), "cpu")


def test_differences_are_counted_in_spreads() -> None:
    assert compare("mine", TESTED, [0.0, 1.0, 2.1, 4.0], "the record") == pytest.approx(0.1 / 4)
    with pytest.raises(RewardError, match=r"pair 2 2, but the record says 2.3: more than 0.05 of the spread 4"):
        compare("mine", TESTED, [0.0, 1.0, 2.3, 4.0], "the record")
    with pytest.raises(RewardError, match="the record has 3 golden scores, not 4"):
        compare("mine", TESTED, [0.0, 1.0, 2.0], "the record")


def test_identity_tells_settings_weights_and_functions_apart() -> None:
    assert identity(Brightness(2.0)) != identity(Brightness(3.0))
    assert identity(constant) == f"{__name__}.constant"
    clip, changed = (clip_score(path="shapes", backend=Eager()) for _ in range(2))
    assert identity(clip) == identity(clip_score(path="shapes", backend=Eager(precision="bfloat16")))
    with torch.no_grad():
        next(changed.network.parameters()).add_(1e-3)
    assert identity(changed) != identity(clip)


def test_a_reward_brings_golden_pairs_of_its_own() -> None:
    pairs = GoldenSet("mine", torch.linspace(0, 1, 5)[:, None, None, None].expand(5, 3, 8, 8), ["a"] * 5)

    class Threshold:
        """Says 0 to every scene, so that the package's pairs would refuse it."""

        golden_set = pairs

        def __call__(self, images_BCHW: Tensor, prompts: list[str]) -> Tensor:
            return (images_BCHW.mean(dim=(1, 2, 3)) > 0.6).float()

    assert golden_scores(rewards_of(Threshold()), "cpu")["mine"].scores == [0, 0, 0, 1, 1]


def test_a_judge_of_certain_prompts_only_is_not_tried() -> None:
    class Particular(Brightness):
        golden_set = "none"

        def __call__(self, images_BCHW: Tensor, prompts: list[str]) -> Tensor:
            raise AssertionError("it was tried")

    assert golden_scores(rewards_of(Particular()), "cpu") == {}


def test_a_golden_set_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="no golden set 'scens'; use one of scenes, texts, or none"):
        golden_set("scens")


def test_the_configs_carry_the_switch() -> None:
    assert build(load_config("train", [])["reward"]).golden
    assert not build(load_config("train", ["reward.golden=false"])["reward"]).golden
