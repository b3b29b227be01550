"""CLIP score on a random miniature: equal to transformers' own processor and model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from fastgrpo.compile.networks import Eager
from fastgrpo.config import load_config
from fastgrpo.rewards.clip_score import clip_score
from fastgrpo.rewards.networks.preprocess import Preprocess
from fastgrpo.rewards.reward import Reward
from fastgrpo.rewards.scoring import Scoring
from fastgrpo.rewards.weighted_sum import Rewards
from tests.rewards.miniatures import save_clip, to_images


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


def random_pixels(height: int, width: int) -> np.ndarray:
    """Smooth and noisy images [3, H, W, 3] of bytes."""
    generator = torch.Generator().manual_seed(height * 1000 + width)
    coarse = F.interpolate(torch.rand(3, 3, 5, 5, generator=generator), (height, width), mode="bilinear")
    coarse[2] = torch.rand(3, height, width, generator=generator)
    return (coarse * 255).round().byte().permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (96, 70), (33, 100), (20, 16)], ids=str)
def test_preprocessing_equals_transformers(directory: Path, size: tuple[int, int]) -> None:
    processor = CLIPImageProcessorPil.from_pretrained(directory)
    pixels_BHWC = random_pixels(*size)
    expected = processor(images=list(pixels_BHWC), return_tensors="pt", input_data_format="channels_last").pixel_values
    config = json.loads((directory / "preprocessor_config.json").read_text())
    ours = Preprocess.from_config(config, "the test")(to_images(pixels_BHWC))
    # a byte would be 0.015
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


def test_score_is_the_cosine_of_transformers_own_embeddings(directory: Path) -> None:
    model, tokenizer = CLIPModel.from_pretrained(directory), CLIPTokenizer.from_pretrained(directory)
    processor = CLIPImageProcessorPil.from_pretrained(directory)
    pixels_BHWC = random_pixels(50, 45)
    prompts = ["a red circle", "a blue square", "a red circle"]
    with torch.no_grad():
        # one pair at a time, unpadded: neither batching nor padding may matter
        expected = [
            model(
                **tokenizer(prompt, return_tensors="pt"),
                **processor(images=pixels_HWC, return_tensors="pt", input_data_format="channels_last"),
            ).logits_per_image.item()
            / model.logit_scale.exp().item()
            for pixels_HWC, prompt in zip(pixels_BHWC, prompts, strict=True)
        ]
    score_B = clip_score(path=str(directory), backend=Eager())(to_images(pixels_BHWC), prompts)
    torch.testing.assert_close(score_B, torch.tensor(expected), atol=1e-5, rtol=0)
    assert score_B.unique().numel() == 3


def test_a_directory_without_its_tokenizer_is_refused(directory: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        (tmp_path / name).symlink_to(directory / name)
    with pytest.raises(ValueError, match=r"tokenizer in .* put the model's tokenizer.json"):
        clip_score(path=str(tmp_path), backend=Eager())


def test_a_path_without_a_clip_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no preprocessor_config.json, .* or give reward.terms.clip_score.path"):
        clip_score(path=str(tmp_path), backend=Eager())


@pytest.mark.parametrize(
    "change", [{"resample": 2}, {"size": {"height": 32, "width": 32}}, {"crop_size": 40}, {"do_resize": False}], ids=str
)
def test_a_preprocessor_that_does_something_else_is_refused(change: dict) -> None:
    config = {
        "size": {"shortest_edge": 32},
        "crop_size": 32,
        "resample": 3,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    with pytest.raises(ValueError, match="the test"):
        Preprocess.from_config({**config, **change}, "the test")


def test_the_embedded_scorer_refuses_prompts_that_it_was_never_shown() -> None:
    terms: dict[str, Reward] = {"clip": clip_score(path="shapes", backend=Eager())}
    rewards = Rewards(terms=terms, weights={"clip": 1.0}, scoring=Scoring())
    rewards.check_prompts(["a red circle left of a blue square", "three green triangles"])
    with pytest.raises(ValueError, match=r"reward 'clip' cannot judge the prompt 'a red kite'.*use reward=clip_score"):
        rewards.check_prompts(["two blue circles", "a red kite"])


def test_a_clip_of_ones_own_takes_any_prompt(directory: Path) -> None:
    assert clip_score(path=str(directory), backend=Eager()).check_prompt is None


def test_the_default_clip_is_the_official_one_and_the_toy_has_a_name_of_its_own() -> None:
    paths = {
        name: load_config("train", [f"reward={name}"]).reward.terms[name].path for name in ("clip_score", "clip_shapes")
    }
    assert paths == {"clip_score": "openai/clip-vit-large-patch14", "clip_shapes": "shapes"}
    sd35 = load_config("train", ["experiment=flow_grpo_sd35", "prompts.path=a", "prompts.held_out=b"])
    assert sd35.reward.terms.clip_score.path == "openai/clip-vit-large-patch14"
