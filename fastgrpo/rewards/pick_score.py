"""PickScore: a CLIP-H trained on which of two images people picked; scale * cosine, about 15 to 26.  arXiv:2305.01569.

score = exp(logit_scale) * cosine(image, text)
"""

from transformers import CLIPModel

from fastgrpo.rewards.networks.checkpoints import checkpoint_directory, load_directory, read_for
from fastgrpo.rewards.networks.clip import ClipImageTower, ClipSimilarity, ClipTexts, random_image_tower, vit_h_14
from fastgrpo.rewards.networks.network_reward import Backend, NetworkReward
from fastgrpo.rewards.networks.preprocess import Preprocess
from fastgrpo.rewards.networks.tokens import CLIP_TOKENIZER_FILES, has_clip_tokenizer, load_clip_tokenizer

_OPTION = "reward.terms.pick_score"


def pick_score(*, path: str, processor: str, backend: Backend) -> NetworkReward:
    """The CLIPModel at ``path``, a directory or hub id of config.json and model.safetensors.

    preprocessor_config.json and the tokenizer are those at ``path`` if it has both, else those at ``processor``.
    """
    processor_files = ["preprocessor_config.json", *CLIP_TOKENIZER_FILES]
    directory = checkpoint_directory(
        path, ["config.json", "model.safetensors"], extra=processor_files, option=f"{_OPTION}.path"
    )
    origin = f"{_OPTION}.path", path
    with read_for(*origin):
        model = load_directory(CLIPModel, directory)
    if not has_clip_tokenizer(directory) or not (directory / "preprocessor_config.json").is_file():
        origin = f"{_OPTION}.processor", processor
        directory = checkpoint_directory(processor, processor_files[:1], extra=CLIP_TOKENIZER_FILES, option=origin[0])
    with read_for(*origin):
        preprocess = Preprocess.from_file(directory / "preprocessor_config.json")
        tokenizer = load_clip_tokenizer(directory, model.config.text_config.vocab_size)
    return NetworkReward(
        network=ClipSimilarity(ClipImageTower(model), scale=model.logit_scale.exp().item()),
        preprocess=preprocess,
        backend=backend,
        encode=ClipTexts(model=model, tokenizer=tokenizer),
    )


def full_size() -> ClipSimilarity:
    """The network in PickScore_v1's size, of random weights: texts are [B, 1024]."""
    return ClipSimilarity(random_image_tower(vit_h_14()), scale=100.0)
