"""The reward configs, composed and instantiated as ``fastgrpo train`` does it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

from fastgrpo.rewards.weighted_sum import Rewards
from fastgrpo.shapes.world import draw, parse_caption, sample_scene

CAPTION = "two green squares"


def build(*overrides: str) -> Rewards:
    with initialize_config_module("fastgrpo_configs", version_base="1.3"):
        return instantiate(compose(overrides=list(overrides)).reward)


@pytest.fixture
def images_BCHW() -> torch.Tensor:
    generator = np.random.default_rng(1)
    return draw([sample_scene(parse_caption(CAPTION), generator) for _ in range(2)])


def test_shapes_trains_on_the_graded_verifier_and_watches_the_strict_one(images_BCHW: torch.Tensor) -> None:
    answer = build("+reward=shapes")(images_BCHW, [CAPTION, "a red circle"])
    assert answer.named["shapes_strict"].tolist() == [[1.0], [0.0]]
    assert torch.equal(answer.total_PG, answer.named["shapes"])
    assert answer.total_PG[0].item() == 1.0


def test_two_overrides_add_a_weighted_term(images_BCHW: torch.Tensor) -> None:
    rewards = build(
        "+reward=shapes", "+reward/terms@reward.terms.jpeg=jpeg_compressibility", "+reward.weights.jpeg=0.1"
    )
    answer = rewards(images_BCHW, [CAPTION])
    torch.testing.assert_close(answer.total_PG, answer.named["shapes"] + 0.1 * answer.named["jpeg"])
    assert (answer.named["jpeg"] < 0).all()


def test_jpeg_configs_differ_in_sign_alone(images_BCHW: torch.Tensor) -> None:
    small, large = build("+reward=jpeg_compressibility"), build("+reward=jpeg_incompressibility")
    assert torch.equal(small(images_BCHW, [CAPTION]).total_PG, -large(images_BCHW, [CAPTION]).total_PG)


def test_a_reward_of_the_users_own_needs_its_path_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images_BCHW: torch.Tensor
) -> None:
    (tmp_path / "own_rewards.py").write_text(
        "def redness(images, prompts):\n    return images[:, 0].mean(dim=(1, 2))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    answer = build("+reward=custom", "reward.path=own_rewards.redness")(images_BCHW, [CAPTION])
    torch.testing.assert_close(answer.total_PG[0], images_BCHW[:, 0].mean(dim=(1, 2)))

    mixed = build(
        "+reward=shapes",
        "+reward/terms@reward.terms.red=custom",
        "reward.terms.red.path=own_rewards.redness",
        "+reward.weights.red=-2",
    )
    answer = mixed(images_BCHW, [CAPTION])
    torch.testing.assert_close(answer.total_PG, answer.named["shapes"] - 2 * answer.named["red"])
