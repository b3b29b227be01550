"""PickScore on a random miniature: equal to transformers' own processor and model on PIL images."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from fastgrpo.compile.networks import Eager
from fastgrpo.rewards.networks.clip import vit_h_14
from fastgrpo.rewards.networks.network_reward import NetworkReward
from fastgrpo.rewards.pick_score import full_size, pick_score
from tests.rewards.fixtures.random_inputs import random_image
from tests.rewards.miniatures import PROMPTS, save_clip, shapes_of, to_images

MODEL, PROCESSOR = ("config.json", "model.safetensors"), ("preprocessor_config.json", "tokenizer.json")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


def load(path: Path, processor: Path) -> NetworkReward:
    return pick_score(path=str(path), processor=str(processor), backend=Eager())


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (45, 39), (33, 100), (20, 17)], ids=str)
def test_score_is_that_of_the_published_code(directory: Path, size: tuple[int, int]) -> None:
    model, tokenizer = CLIPModel.from_pretrained(directory), CLIPTokenizer.from_pretrained(directory)
    pixels_HWC = random_image(*size)
    with torch.no_grad():
        pixels = CLIPImageProcessorPil.from_pretrained(directory)(Image.fromarray(pixels_HWC), return_tensors="pt")
        image_D = model.get_image_features(**pixels).pooler_output[0]
        texts_UD = model.get_text_features(**tokenizer(PROMPTS, padding=True, return_tensors="pt")).pooler_output
        cosines_U = (texts_UD / texts_UD.norm(dim=-1, keepdim=True)) @ (image_D / image_D.norm())
    scores_U = load(directory, directory)(to_images(pixels_HWC[None]).expand(3, -1, -1, -1), PROMPTS)
    torch.testing.assert_close(scores_U, 20.0 * cosines_U, atol=1e-5, rtol=0)
    assert scores_U.unique().numel() == 3


def test_the_processor_serves_a_model_that_has_none(directory: Path, tmp_path: Path) -> None:
    model, processor = tmp_path / "model", tmp_path / "processor"
    for path, names in ((model, MODEL), (processor, PROCESSOR)):
        path.mkdir()
        for name in names:
            (path / name).symlink_to(directory / name)
    images_BCHW = to_images(random_image(40, 50)[None])
    together, apart = load(directory, Path("nobody/here")), load(model, processor)
    assert torch.equal(together(images_BCHW, PROMPTS[:1]), apart(images_BCHW, PROMPTS[:1]))
    with pytest.raises(ValueError, match=r"reward.terms.pick_score.processor=nobody/here could not be downloaded"):
        load(model, Path("nobody/here"))


def test_the_full_size_is_clip_h() -> None:
    with torch.device("meta"):
        whole, trunk = CLIPModel(vit_h_14()), full_size().trunk
    assert sum(weight.numel() for weight in whole.state_dict().values()) == 986_109_441
    vision = {name: shape for name, shape in shapes_of(whole).items() if name.startswith("vis")}
    assert shapes_of(trunk) == vision
