"""How many tokens the longest of many texts has, by a model's tokenizers where these are on this machine."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from fastgrpo.files.hub import HubId
from fastgrpo.files.locations import resolve_path
from fastgrpo.models.quiet import errors_alone

# the longest by their bytes: among them is the longest in tokens, but for texts of nearly one length
_NUM_TRIED = 64


def longest_in_tokens(weights: str, texts: Sequence[str]) -> dict[str, int]:
    """By each tokenizer of ``model.weights``, without what a chat template adds; empty where none is here.

    Nothing is downloaded.
    """
    directory = _directory(weights)
    if directory is None:
        return {}
    tried = sorted(texts, key=lambda text: len(text.encode()), reverse=True)[:_NUM_TRIED]
    counts = {}
    for path in sorted(directory.glob("tokenizer*")):
        tokenizer = _load(path)
        if tokenizer is not None:
            with errors_alone():
                counts[path.name] = max(len(tokenizer(text).input_ids) for text in tried)
    return counts


def _directory(weights: str) -> Path | None:
    if not weights:
        return None
    directory = Path(resolve_path(weights))
    if directory.is_dir():
        return directory
    found = HubId.parse(weights)
    return None if found is None else found.on_disk()


def _load(path: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError):
        # of parts of a download that were not wanted
        return None
