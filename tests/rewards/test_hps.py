"""HPSv2 on a random miniature: equal to what the package hpsv2 answered, which fixtures/make_hps.py recorded."""

from pathlib import Path

import pytest
import torch

from fastgrpo.rewards.hps import hps
from fastgrpo.rewards.network import NetworkReward
from fastgrpo.runtime.compile import Eager
from tests.rewards.miniatures import recorded, recorded_images, save_hps

RECORD = recorded("hps")
FILE = "HPS_v2.1_compressed.pt"


def load(directory: Path) -> NetworkReward:
    return hps(path=str(directory), file=FILE, tokenizer=str(directory), backend=Eager())


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hps(tmp_path_factory.mktemp("hps"))


def test_score_is_that_of_the_package(directory: Path) -> None:
    reward = load(directory)
    for prompt, expected in zip(RECORD["prompts"], RECORD["scores"], strict=True):
        scores = [reward(image, [prompt]).item() for image in recorded_images(RECORD)]
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
