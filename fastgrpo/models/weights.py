"""Where the weights of a pipeline are, and whether what was loaded of them is whole."""

from importlib.resources import files
from typing import Any

_MIN_VOCABULARY = 32


def local_path(weights: str) -> str:
    """A hub id or directory as it is; ``pkg://package/path`` as the directory inside the installed package."""
    if not weights.startswith("pkg://"):
        return weights
    package, _, inside = weights.removeprefix("pkg://").partition("/")
    return str(files(package) / inside)


def refuse_hollow_tokenizers(weights: str, *tokenizers: Any) -> None:
    """ValueError for a tokenizer without words: transformers makes one, without an error, where files are missing."""
    for tokenizer in tokenizers:
        if tokenizer is not None and len(tokenizer) < _MIN_VOCABULARY:
            raise ValueError(
                f"model.weights: a tokenizer of {weights!r} has {len(tokenizer)} words; its files are missing"
            )
