"""Tokenizers of reward models."""

from pathlib import Path
from typing import Any

from transformers import BertTokenizer, CLIPTokenizer

# either the first file, or the two after it
CLIP_TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


def has_clip_tokenizer(directory: Path) -> bool:
    return (directory / "tokenizer.json").is_file() or (directory / "vocab.json").is_file()


def load_clip_tokenizer(directory: Path, vocabulary: int) -> CLIPTokenizer:
    """The tokenizer in ``directory``; ValueError if it lacks tokens of the model's vocabulary."""
    tokenizer = _load(CLIPTokenizer, directory)
    # transformers answers with a tokenizer of a few special tokens, and no error, when the files are missing
    if len(tokenizer) != vocabulary:
        raise ValueError(
            f"the tokenizer in {directory} has {len(tokenizer)} tokens, its model {vocabulary}; "
            "put the model's tokenizer.json, or vocab.json and merges.txt, there"
        )
    return tokenizer


def load_blip_tokenizer(directory: Path, vocabulary: int) -> BertTokenizer:
    """BERT's tokenizer by ``directory``'s vocab.txt, with BLIP's two tokens; ValueError if the model has others."""
    tokenizer = _load(BertTokenizer, directory)
    tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
    if len(tokenizer) != vocabulary:
        raise ValueError(
            f"the tokenizer in {directory} has {len(tokenizer)} tokens with BLIP's [DEC] and [ENC], its model "
            f"{vocabulary}; put the vocab.txt of google-bert/bert-base-uncased there"
        )
    return tokenizer


def _load(tokenizer_class: Any, directory: Path) -> Any:
    try:
        return tokenizer_class.from_pretrained(directory, local_files_only=True)
    # the library of tokenizers raises nothing more exact
    except Exception as error:
        raise ValueError(
            f"the tokenizer in {directory} cannot be read ({type(error).__name__}: {error}); download its files again"
        ) from error
