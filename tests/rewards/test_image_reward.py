"""ImageReward on a random miniature: equal to what the authors' package answered (fixtures/make_image_reward.py)."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastgrpo.compile.networks import Eager
from fastgrpo.rewards.image_reward import ImageRewardPackage, full_size, image_reward
from fastgrpo.rewards.networks.blip import blip_configs
from fastgrpo.rewards.networks.network_reward import NetworkReward
from fastgrpo.rewards.networks.tokens import load_blip_tokenizer
from tests.rewards.miniatures import (
    official_shapes,
    recorded,
    recorded_images,
    save_image_reward,
    shapes_of,
)

RECORD = recorded("image_reward")
FILE = "ImageReward.pt"


def load(directory: Path) -> NetworkReward:
    return image_reward(path=str(directory), file=FILE, tokenizer=str(directory), backend=Eager())


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_image_reward(tmp_path_factory.mktemp("image_reward"))


def test_score_is_that_of_the_package(directory: Path) -> None:
    reward = load(directory)
    for prompt, expected in zip(RECORD["prompts"], RECORD["scores"], strict=True):
        scores = [reward(image, [prompt]).item() for image in recorded_images(RECORD)]
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)


def test_a_batch_scores_as_its_images_do_alone(directory: Path) -> None:
    reward = load(directory)
    images = [image[..., :32, :32] for image in recorded_images(RECORD)]
    prompts = [RECORD["prompts"][i] for i in (0, 1, 3, 2, 0)]
    alone = [reward(image, [prompt]).item() for image, prompt in zip(images, prompts, strict=True)]
    torch.testing.assert_close(reward(torch.cat(images), prompts).tolist(), alone, atol=1e-5, rtol=0)


def test_pixels_are_those_of_the_package(directory: Path) -> None:
    pixels_BCHW = load(directory).preprocess(recorded_images(RECORD)[2])
    expected_BCHW = torch.tensor(RECORD["pixels_of_image_2"]).reshape(1, 3, 32, 32)
    torch.testing.assert_close(pixels_BCHW, expected_BCHW, atol=1e-5, rtol=0)


def test_tokens_are_those_of_the_package(directory: Path) -> None:
    tokenizer = load_blip_tokenizer(directory, len(RECORD["vocabulary"]) + 2)
    assert tokenizer(RECORD["prompts"], truncation=True, max_length=35).input_ids == RECORD["tokens"]


def test_the_official_weights_fit_the_full_size() -> None:
    weights = official_shapes("image_reward")
    with torch.device("meta"):
        network = full_size()
    # unused by the score, but the two projections and the buffer are all that is left out
    used = {name: weight for name, weight in weights.items() if "_proj." not in name and "position_ids" not in name}
    assert sum(weight.numel() for weight in used.values()) == sum(w.numel() for w in network.state_dict().values())
    ours = shapes_of(network)
    for name, weight in used.items():
        if name.startswith("mlp."):
            assert ours[name.replace("mlp.", "head.")] == weight.shape
        if name.startswith("blip.text_encoder."):
            assert ours[name.replace("blip.text_encoder.", "trunk.text.")] == weight.shape


def test_sizes_are_read_from_the_weights() -> None:
    with torch.device("meta"):
        network = full_size()
    vision, text = blip_configs(network.trunk.vision.state_dict(), network.trunk.text.state_dict())
    for read, built in ((vision, network.trunk.vision.config), (text, network.trunk.text.config)):
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "layer_norm_eps"):
            assert getattr(read, name) == getattr(built, name), name
    assert (vision.image_size, vision.patch_size) == (224, 16)
    assert (text.vocab_size, text.encoder_hidden_size) == (30_524, 1024)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("blip.visual_encoder.norm.bias"), r"lacks post_layernorm.bias"),
        (lambda weights: weights.update({"blip.itm_head.bias": torch.ones(2)}), r"has blip.itm_head.bias"),
        (lambda weights: weights.update({"mlp.layers.8.bias": torch.ones(2)}), r"has layers.8.bias"),
        (lambda weights: weights.pop("blip.visual_encoder.patch_embed.proj.weight"), r"has no .*patch_embedding"),
    ],
    ids=["a weight is missing", "one too many", "a longer MLP", "another model"],
)
def test_other_weights_are_refused_by_name(directory: Path, tmp_path: Path, change: Any, message: str) -> None:
    weights = torch.load(directory / FILE)
    change(weights)
    torch.save(weights, tmp_path / FILE)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_the_package_gets_each_image_with_its_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def score(prompt: str, image: Image.Image) -> float:
        asked.append((prompt, np.asarray(image).tolist()))
        return float(len(asked))

    def load_model(name: str, device: str) -> SimpleNamespace:
        assert (name, device) == ("ImageReward-v1.0", "cpu")
        return SimpleNamespace(score=score)

    package = SimpleNamespace(load=load_model)
    monkeypatch.setitem(sys.modules, "ImageReward", package)
    images_BCHW = torch.zeros(2, 3, 1, 2)
    images_BCHW[1, 0, 0, 1] = 0.6
    reward = ImageRewardPackage()
    assert reward(images_BCHW, ["a", "b"]).tolist() == [1.0, 2.0]
    assert asked == [("a", [[[0, 0, 0], [0, 0, 0]]]), ("b", [[[0, 0, 0], [153, 0, 0]]])]


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ImageReward", None)
    with pytest.raises(ValueError, match=r"fastgrpo\[image-reward\].*reward=image_reward"):
        ImageRewardPackage()
