"""Where the weights of a pipeline are, and whether what was loaded of them is whole."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

_MIN_VOCABULARY = 32


def load_pipeline(
    pipeline_class: Any, weights: str, dtype: torch.dtype, decode_dtype: torch.dtype, **components: Any
) -> Any:
    """A diffusers pipeline with its autoencoder in ``decode_dtype``; ``components`` take the place of stored ones.

    ValueError for weights that cannot be loaded or are not whole.
    """
    try:
        pipeline = pipeline_class.from_pretrained(
            local_path(weights), dtype={"default": dtype, "vae": decode_dtype}, **components
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"model.weights: cannot load a {pipeline_class.__name__} from {weights!r}: {error}") from error
    tokenizers = [part for name, part in pipeline.components.items() if name.startswith("tokenizer")]
    refuse_hollow_tokenizers(weights, *tokenizers)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pipeline_directory(pipeline_class: Any, weights: str) -> Path:
    """The directory of a pipeline; of a hub id the one that it was downloaded to."""
    path = Path(local_path(weights)).expanduser()
    return path if path.is_dir() else Path(pipeline_class.download(weights))


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
