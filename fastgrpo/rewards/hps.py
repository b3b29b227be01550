"""HPSv2.1: an open_clip ViT-H-14 trained on human choices; the cosine of image and text, about 0.2 to 0.35.

arXiv:2306.09341.  As the package hpsv2 answers: it pads images to squares, and turns them into floats before it resizes
them.  Its answer depends on torchvision, whose resize of floats smooths since version 0.17: this is the smoothed one.
"""

import html
from pathlib import Path

from transformers import CLIPModel

from fastgrpo.rewards.networks.checkpoints import checkpoint_directory, load_tensors, load_weights, read_for
from fastgrpo.rewards.networks.clip import ClipImageTower, ClipSimilarity, ClipTexts, random_image_tower, vit_h_14
from fastgrpo.rewards.networks.network_reward import Backend, NetworkReward
from fastgrpo.rewards.networks.open_clip import config_of, to_transformers
from fastgrpo.rewards.networks.preprocess import CLIP_MEAN, CLIP_STD, PadToSquare
from fastgrpo.rewards.networks.tokens import CLIP_TOKENIZER_FILES, has_clip_tokenizer, load_clip_tokenizer

_OPTION = "reward.terms.hps"
_NUM_HEADS = 16
_STRAIGHT_QUOTES = str.maketrans("‘’‛“”‟", "'''\"\"\"")


def hps(*, path: str, file: str, tokenizer: str, backend: Backend) -> NetworkReward:
    """open_clip's weights under "state_dict" in ``file`` at ``path``, a directory or hub id.

    The tokenizer, CLIP's own, is that at ``path`` if there is one, else that at ``tokenizer``.
    """
    directory = checkpoint_directory(path, [file], extra=CLIP_TOKENIZER_FILES, option=f"{_OPTION}.path")
    origin = f"{_OPTION}.path", path
    with read_for(*origin):
        model = _load_model(directory / file)
    if not has_clip_tokenizer(directory):
        origin = f"{_OPTION}.tokenizer", tokenizer
        directory = checkpoint_directory(tokenizer, [], extra=CLIP_TOKENIZER_FILES, option=origin[0])
    with read_for(*origin):
        words = load_clip_tokenizer(directory, model.config.text_config.vocab_size)
    return NetworkReward(
        network=ClipSimilarity(ClipImageTower(model)),
        preprocess=PadToSquare(size=model.config.vision_config.image_size, mean=CLIP_MEAN, std=CLIP_STD),
        backend=backend,
        encode=ClipTexts(model=model, tokenizer=words, clean=clean_prompt),
    )


def _load_model(file: Path) -> CLIPModel:
    content = load_tensors(file)
    try:
        weights = content["state_dict"]
        config = config_of(weights, _NUM_HEADS)
    except KeyError as error:
        raise ValueError(
            f"{file} has no {error}; give open_clip's weights of HPSv2 under state_dict, as HPS_v2.1_compressed.pt"
        ) from error
    return load_weights(CLIPModel, config, to_transformers(weights), file)


def clean_prompt(text: str) -> str:
    """What open_clip does to a prompt before CLIP's tokenizer: HTML's entities, twice, and quotes as on a typewriter.

    The rest of ftfy, which mends wrongly decoded text, is left out.
    """
    return html.unescape(html.unescape(text.translate(_STRAIGHT_QUOTES)))


def full_size() -> ClipSimilarity:
    """The network in HPSv2.1's size, of random weights: texts are [B, 1024]."""
    return ClipSimilarity(random_image_tower(vit_h_14()))
