"""Which text encoders a pipeline's directory holds, told from its files, so that they need not be loaded."""

import hashlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path

from fastgrpo.own_code.found import is_ours

# of what is hashed here, and of what a condition is made of
_LAYOUT = 2
# a processor is a tokenizer with a chat template, and more
_PREFIXES = ("text_encoder", "tokenizer", "processor")
_PIECE_BYTES = 4096
_NUM_PIECES = 256


def encoder_identity(directory: Path, settings: Mapping[str, object]) -> str:
    """A hash of the text encoders and tokenizers in a pipeline's directory, and of ``settings``, which JSON can hold.

    Of a weight file it takes the size and pieces spread over it: gigabytes need not be read to tell two models apart.
    """
    parts = [path for path in sorted(directory.iterdir()) if path.name.startswith(_PREFIXES)]
    files = [path for part in parts for path in sorted(part.rglob("*")) if path.is_file()]
    if not files:
        raise ValueError(f"{directory} has no text_encoder and no tokenizer; is it a pipeline's directory?")
    digest = hashlib.sha256(json.dumps([_LAYOUT, settings], sort_keys=True).encode())
    for path in files:
        digest.update(f"{path.relative_to(directory)} {path.stat().st_size} ".encode())
        with open(path, "rb") as file:
            for offset in _offsets(path.stat().st_size):
                file.seek(offset)
                digest.update(file.read(_PIECE_BYTES))
    return digest.hexdigest()[:32]


def code_identity(model_class: type) -> str:
    """Names a class that encodes texts: a user's own also by what its file says now."""
    name = f"{model_class.__module__}.{model_class.__qualname__}"
    path = None if is_ours(name) else inspect.getsourcefile(model_class)
    return name if path is None else f"{name} {hashlib.sha256(Path(path).read_bytes()).hexdigest()}"


def _offsets(num_bytes: int) -> list[int]:
    """Where the pieces of a file begin: everywhere in a short one, the first and the last included."""
    if num_bytes <= _NUM_PIECES * _PIECE_BYTES:
        return list(range(0, num_bytes, _PIECE_BYTES))
    return [i * (num_bytes - _PIECE_BYTES) // (_NUM_PIECES - 1) for i in range(_NUM_PIECES)]
