"""CLIP score: the cosine between an image's and its prompt's CLIP embeddings, in [-1, 1].  arXiv:2104.08718.

Images are prepared on the device they are on, by the numbers in the model's own ``preprocessor_config.json``: bytes,
antialiased bicubic resize of the short side, center crop, normalization.  Letters: B images, U different prompts.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer

from fastgrpo import shapes
from fastgrpo_kernels import preprocess_images

_BICUBIC = 3


@dataclass(frozen=True, kw_only=True)
class ClipPreprocess:
    """Images in [0, 1] to a CLIP vision tower's input, as transformers' processor makes it from Pillow images."""

    short_side: int
    crop_height: int
    crop_width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any], origin: str) -> "ClipPreprocess":
        """The steps of a ``preprocessor_config.json``; ValueError for one that does something else."""
        size, crop = config.get("size"), config.get("crop_size")
        short_side = size.get("shortest_edge") if isinstance(size, dict) else size
        crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
        if (
            not isinstance(short_side, int)
            or not isinstance(crop, dict)
            or config.get("resample", _BICUBIC) != _BICUBIC
        ):
            raise ValueError(
                f"{origin} asks for size {size}, crop {crop}, resample {config.get('resample')}; a CLIP directory has "
                "size.shortest_edge, crop_size.height and width, and resample 3 (bicubic)"
            )
        if max(crop["height"], crop["width"]) > short_side:
            raise ValueError(f"{origin} crops {crop} out of a short side of {short_side}; make the crop fit")
        return cls(
            short_side=short_side,
            crop_height=crop["height"],
            crop_width=crop["width"],
            mean=tuple(config["image_mean"]),
            std=tuple(config["image_std"]),
        )

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        return preprocess_images(
            images_BCHW,
            resize=self.short_side,
            crop=(self.crop_height, self.crop_width),
            mean=self.mean,
            std=self.std,
            low=0.0,
        )


@dataclass(frozen=True, kw_only=True)
class ClipScore:
    """The CLIP in the directory ``path`` (as transformers saves it), or ``shapes``, the scorer of the embedded model.

    It computes in float32, on the device that the images are on.
    """

    path: str
    _model: Any = field(init=False, repr=False, compare=False)
    _tokenizer: CLIPTokenizer = field(init=False, repr=False, compare=False)
    _preprocess: ClipPreprocess = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        embedded = Path(shapes.__file__).parent / "checkpoint" / "scorer"
        directory = embedded if self.path == "shapes" else Path(self.path).expanduser()
        config = directory / "preprocessor_config.json"
        if not config.exists():
            raise ValueError(
                f"{config} does not exist; give reward.terms.clip_score.path the directory of a CLIP with its "
                "tokenizer and preprocessor_config.json, for example a download of openai/clip-vit-large-patch14"
            )
        model: Any = CLIPModel.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
        object.__setattr__(self, "_model", model.eval().requires_grad_(False))
        object.__setattr__(self, "_tokenizer", _load_tokenizer(directory, model.config.text_config.vocab_size))
        preprocess = ClipPreprocess.from_config(json.loads(config.read_text()), str(config))
        object.__setattr__(self, "_preprocess", preprocess)

    @torch.no_grad()
    def __call__(self, images_BCHW: Tensor, prompts: list[str]) -> Tensor:
        device = images_BCHW.device
        # a group shares its prompt, so encode each text once
        texts = list(dict.fromkeys(prompts))
        rows_B = torch.tensor([texts.index(prompt) for prompt in prompts], device=device)
        length = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        answer = self._model.to(device)(
            input_ids=tokens.input_ids.to(device),
            attention_mask=tokens.attention_mask.to(device),
            pixel_values=self._preprocess(images_BCHW),
        )
        images_BD, texts_UD = F.normalize(answer.image_embeds, dim=-1), F.normalize(answer.text_embeds, dim=-1)
        return (images_BD * texts_UD[rows_B]).sum(dim=-1)


def _load_tokenizer(directory: Path, vocabulary: int) -> CLIPTokenizer:
    tokenizer = CLIPTokenizer.from_pretrained(directory, local_files_only=True)
    # transformers answers with a tokenizer of a few special tokens, and no error, when the files are missing
    if len(tokenizer) != vocabulary:
        raise ValueError(
            f"the tokenizer in {directory} has {len(tokenizer)} tokens, its model {vocabulary}; "
            "put the model's tokenizer.json, or vocab.json and merges.txt, there"
        )
    return tokenizer
