"""CLIP score: the cosine between an image's and its prompt's CLIP embeddings, in [-1, 1].  arXiv:2104.08718."""

from pathlib import Path

from transformers import CLIPModel

from fastgrpo import shapes
from fastgrpo.rewards.networks.checkpoints import checkpoint_directory, load_directory, read_for
from fastgrpo.rewards.networks.clip import ClipImageTower, ClipSimilarity, ClipTexts, random_image_tower, vit_l_14
from fastgrpo.rewards.networks.network_reward import Backend, NetworkReward
from fastgrpo.rewards.networks.preprocess import Preprocess
from fastgrpo.rewards.networks.tokens import CLIP_TOKENIZER_FILES, load_clip_tokenizer
from fastgrpo.shapes.world import parse_caption

_OPTION = "reward.terms.clip_score.path"


def clip_score(*, path: str, backend: Backend) -> NetworkReward:
    """The CLIP at ``path``, a directory or hub id, or ``shapes``: the scorer of the embedded model, for its captions.

    The directory is what transformers saves: config.json, model.safetensors, preprocessor_config.json, a tokenizer.
    """
    embedded = Path(shapes.__file__).parent / "checkpoint" / "scorer"
    directory = checkpoint_directory(
        str(embedded) if path == "shapes" else path,
        ["preprocessor_config.json", "config.json", "model.safetensors"],
        extra=CLIP_TOKENIZER_FILES,
        option=_OPTION,
    )
    with read_for(_OPTION, path):
        model = load_directory(CLIPModel, directory)
        preprocess = Preprocess.from_file(directory / "preprocessor_config.json")
        tokenizer = load_clip_tokenizer(directory, model.config.text_config.vocab_size)
    return NetworkReward(
        network=ClipSimilarity(ClipImageTower(model)),
        preprocess=preprocess,
        backend=backend,
        encode=ClipTexts(model=model, tokenizer=tokenizer),
        check_prompt=_check_caption if path == "shapes" else None,
    )


def _check_caption(prompt: str) -> None:
    """ValueError for what the embedded scorer was never shown: it would score it as if it knew."""
    try:
        parse_caption(prompt)
    except ValueError as error:
        raise ValueError(
            f"{error}; the embedded scorer knows no others: use reward=clip_score for CLIP itself"
        ) from error


def full_size() -> ClipSimilarity:
    """The network in the size of openai/clip-vit-large-patch14, of random weights: texts are [B, 768]."""
    return ClipSimilarity(random_image_tower(vit_l_14()))
