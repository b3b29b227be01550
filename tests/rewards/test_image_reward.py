"""ImageReward on a random miniature: equal to what the authors' package answered (fixtures/make_image_reward.py)."""

from pathlib import Path

import pytest
import torch

from fastgrpo.rewards.image_reward import image_reward
from fastgrpo.rewards.network import NetworkReward
from fastgrpo.runtime.compile import Eager
from tests.rewards.miniatures import recorded, recorded_images, save_image_reward

RECORD = recorded("image_reward")


def load(directory: Path) -> NetworkReward:
    return image_reward(path=str(directory), file="ImageReward.pt", tokenizer=str(directory), backend=Eager())


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_image_reward(tmp_path_factory.mktemp("image_reward"))


def test_score_is_that_of_the_package(directory: Path) -> None:
    reward = load(directory)
    for prompt, expected in zip(RECORD["prompts"], RECORD["scores"], strict=True):
        scores = [reward(image, [prompt]).item() for image in recorded_images(RECORD)]
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
