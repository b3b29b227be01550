"""HPSv2 on a random miniature: equal to what the package hpsv2 answered, which fixtures/make_hps.py recorded."""

from pathlib import Path

import pytest
import torch
from transformers import CLIPModel

from fastgrpo.compile.networks import Eager
from fastgrpo.rewards.hps import clean_prompt, full_size, hps
from fastgrpo.rewards.networks.clip import vit_h_14
from fastgrpo.rewards.networks.network_reward import NetworkReward
from fastgrpo.rewards.networks.open_clip import config_of, to_transformers
from fastgrpo.rewards.networks.tokens import load_clip_tokenizer
from tests.rewards.miniatures import official_shapes, recorded, recorded_images, save_hps, shapes_of

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


def test_pixels_are_those_of_the_package(directory: Path) -> None:
    pixels_BCHW = load(directory).preprocess(recorded_images(RECORD)[2])
    expected_BCHW = torch.tensor(RECORD["pixels_of_image_2"]).reshape(1, 3, 28, 28)
    torch.testing.assert_close(pixels_BCHW, expected_BCHW, atol=1e-5, rtol=0)


def test_tokens_are_those_of_the_package(directory: Path) -> None:
    vocabulary = RECORD["shapes"]["token_embedding.weight"][0]
    tokenizer = load_clip_tokenizer(directory, vocabulary)
    cleaned = [clean_prompt(prompt) for prompt in RECORD["prompts"]]
    assert tokenizer(cleaned, truncation=True, max_length=77).input_ids == RECORD["tokens"]


def test_the_official_weights_fit_the_full_size() -> None:
    weights = official_shapes("hps")
    config = config_of(weights, num_heads=16)
    with torch.device("meta"):
        assert shapes_of(CLIPModel(config)) == {name: weight.shape for name, weight in to_transformers(weights).items()}
        assert shapes_of(CLIPModel(config)) == shapes_of(CLIPModel(vit_h_14()))
        trunk = shapes_of(full_size().trunk)
    for name in ("num_attention_heads", "hidden_act", "layer_norm_eps"):
        for part in ("text_config", "vision_config"):
            assert getattr(getattr(config, part), name) == getattr(getattr(vit_h_14(), part), name)
    whole = to_transformers(weights)
    assert trunk == {
        name: whole[name].shape for name in whole if name.startswith(("vision_model", "visual_projection"))
    }
    # as open_clip's own table of models counts them
    assert sum(weight.numel() for weight in weights.values()) == 986_109_441


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("visual.transformer.resblocks.1.ln_2.bias"), r"lacks vision_model.*1.layer_norm2"),
        (lambda weights: weights.update({"visual.extra.bias": torch.ones(2)}), r"has visual.extra.bias"),
        (lambda weights: weights.update({"text_projection": torch.ones(48, 20)}), r"does not fit the model"),
        (lambda weights: weights.pop("visual.conv1.weight"), r"has no 'visual.conv1.weight'; give open_clip's"),
    ],
    ids=["a weight is missing", "one too many", "another shape", "another model"],
)
def test_other_weights_are_refused_by_name(directory: Path, tmp_path: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    checkpoint = torch.load(directory / FILE)
    change(checkpoint["state_dict"])
    torch.save(checkpoint, tmp_path / FILE)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_the_tokenizer_beside_the_weights_comes_before_the_other(directory: Path, tmp_path: Path) -> None:
    (tmp_path / FILE).symlink_to(directory / FILE)
    with pytest.raises(ValueError, match=r"reward.terms.hps.tokenizer=nobody/here could not be downloaded"):
        hps(path=str(tmp_path), file=FILE, tokenizer="nobody/here", backend=Eager())
    image, prompt = recorded_images(RECORD)[1], ["a red circle"]
    beside = hps(path=str(directory), file=FILE, tokenizer="nobody/here", backend=Eager())
    elsewhere = hps(path=str(tmp_path), file=FILE, tokenizer=str(directory), backend=Eager())
    assert torch.equal(beside(image, prompt), elsewhere(image, prompt))
