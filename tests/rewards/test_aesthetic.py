"""The aesthetic predictor on a random miniature: equal to its formula over transformers' own embeddings."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from fastgrpo.compile.networks import Eager
from fastgrpo.rewards.aesthetic import aesthetic, full_size
from fastgrpo.rewards.networks.clip import vit_l_14
from fastgrpo.rewards.networks.network_reward import NetworkReward
from tests.rewards.fixtures.random_inputs import random_image
from tests.rewards.miniatures import save_aesthetic_head, save_clip, shapes_of, to_images

HEAD = "aesthetic-model.pth"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_aesthetic_head(save_clip(tmp_path_factory.mktemp("aesthetic")))


def load(path: Path, head: Path) -> NetworkReward:
    return aesthetic(path=str(path), head=str(head), head_file=HEAD, backend=Eager())


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (45, 39), (33, 100), (20, 17)], ids=str)
def test_score_is_that_of_the_published_formula(directory: Path, size: tuple[int, int]) -> None:
    pixels_HWC = random_image(*size)
    pixels = CLIPImageProcessorPil.from_pretrained(directory)(Image.fromarray(pixels_HWC), return_tensors="pt")
    with torch.no_grad():
        embedding_D = (
            CLIPModel.from_pretrained(directory).get_image_features(**pixels).pooler_output[0].double().numpy()
        )
    expected = embedding_D / np.linalg.norm(embedding_D)
    head = {name: weight.double().numpy() for name, weight in torch.load(directory / HEAD).items()}
    for layer in (0, 2, 4, 6, 7):
        expected = head[f"layers.{layer}.weight"] @ expected + head[f"layers.{layer}.bias"]
    score_B = load(directory, directory)(to_images(pixels_HWC[None]), ["whatever it is"])
    torch.testing.assert_close(score_B.double().numpy(), expected, atol=1e-5, rtol=0)


def test_an_mlp_of_another_clip_is_refused(directory: Path, tmp_path: Path) -> None:
    save_aesthetic_head(tmp_path, width=20)
    with pytest.raises(ValueError, match=r"(?s)aesthetic-model.pth does not fit the model.*layers.0.weight"):
        load(directory, tmp_path)


def test_the_full_size_is_clip_l_and_the_published_mlp() -> None:
    with torch.device("meta"):
        network, whole = full_size(), CLIPModel(vit_l_14())
    # as the hub counts openai/clip-vit-large-patch14
    assert sum(weight.numel() for weight in whole.state_dict().values()) == 427_616_513
    vision = {f"trunk.{name}": shape for name, shape in shapes_of(whole).items() if name.startswith("vis")}
    mlp = {name: shape for name, shape in shapes_of(network).items() if name.startswith("head.")}
    assert shapes_of(network) == {**vision, **mlp}
    assert {name: tuple(shape) for name, shape in mlp.items()} == {
        "head.layers.0.weight": (1024, 768),
        "head.layers.0.bias": (1024,),
        "head.layers.2.weight": (128, 1024),
        "head.layers.2.bias": (128,),
        "head.layers.4.weight": (64, 128),
        "head.layers.4.bias": (64,),
        "head.layers.6.weight": (16, 64),
        "head.layers.6.bias": (16,),
        "head.layers.7.weight": (1, 16),
        "head.layers.7.bias": (1,),
    }
