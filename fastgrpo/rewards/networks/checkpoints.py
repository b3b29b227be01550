"""Where a reward model's files come from: a directory, or a repository of the model hub by its id.

Weights are safetensors, or a foreign ``.pt`` that torch reads as tensors alone: neither can run code.
"""

import pickle
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import Tensor

from fastgrpo.files.hub import HubId

# a buffer of 0, 1, 2, ... that older versions of transformers saved
_HARMLESS = "embeddings.position_ids"


def checkpoint_directory(path: str, files: Sequence[str], *, option: str, extra: Sequence[str] = ()) -> Path:
    """The directory ``path``, or the hub's cache of the id owner/name or owner/name@revision, with all ``files`` in it.

    ``extra`` is downloaded where the repository has it.  ``option`` is the config's key that ``path`` came from.
    ValueError for a path that is neither, and for files that are missing or cannot be downloaded.
    """
    directory = Path(path).expanduser()
    # Path("") would be the working directory
    if not path or not directory.is_dir():
        directory = _download(path, [*files, *extra], option)
    missing = [name for name in files if not (directory / name).is_file()]
    if missing:
        raise ValueError(
            f"{directory} has no {', '.join(missing)}; put the model's there, or give {option} the directory or hub id "
            f"of a model with {', '.join(files)}"
        )
    return directory


def _download(path: str, files: list[str], option: str) -> Path:
    found = HubId.parse(path)
    if found is None:
        looked_for = Path(path).expanduser().absolute() if path else "nothing"
        raise ValueError(
            f"{option}={path!r} is neither a directory here ({looked_for}) nor the id of a model on the hub; "
            "give a directory that exists, or owner/name, or owner/name@revision"
        )
    try:
        return Path(snapshot_download(found.repository, revision=found.revision, allow_patterns=files))
    except (OSError, ValueError) as error:
        raise ValueError(found.why_not(error, option, files)) from error


@contextmanager
def read_for(option: str, path: str) -> Iterator[None]:
    """Inside, whatever is wrong with files is a ValueError that begins with the config's key and its value."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{option}={path}: {error}") from error
    except (OSError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        # what libraries raise over a file that is not what its name says
        raise ValueError(
            f"{option}={path}: {type(error).__name__}: {error}; a file is damaged or of another model: bring it again"
        ) from error


def load_directory(model_class: Any, directory: Path) -> Any:
    """A transformers model of ``directory``'s config.json and model.safetensors, float32 on the CPU.

    ValueError for weights that are not safetensors, and for any that the model lacks or does not know.
    """
    return _load(model_class, directory / "model.safetensors", directory, use_safetensors=True)


def load_weights(model_class: Any, config: Any, weights: Mapping[str, Tensor], origin: Path, **options: Any) -> Any:
    """A transformers model of ``config`` with ``weights``, which came from the file ``origin``; ValueError as above.

    ``options`` are of the model's class.
    """
    return _load(model_class, origin, None, config=config, state_dict=dict(weights), **options)


def _load(model_class: Any, origin: Path, directory: Path | None, **options: Any) -> Any:
    try:
        model, report = model_class.from_pretrained(
            directory,
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    except SafetensorError as error:
        raise ValueError(
            f"{origin} is not a whole safetensors file ({error}); download it again, a pickle under this name is never "
            "read"
        ) from error
    except RuntimeError as error:
        raise ValueError(f"{origin} does not fit the model: {error}; give one that this reward is made for") from error
    _refuse_differences(report["missing_keys"], report["unexpected_keys"], origin)
    return model


def load_tensors(file: Path) -> dict[str, Any]:
    """What a foreign ``.pt``, ``.pth`` or ``.ckpt`` holds; ValueError if that is more than tensors and plain values."""
    try:
        # files of before torch 1.6 are no zip archives, and cannot be mapped
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{file} cannot be read as tensors alone ({reason}); it is damaged, or holds Python objects, which may run "
            "code and are never loaded: download it again from the model's authors"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}; a checkpoint is a dict of tensors by name")
    return content


def load_state(module: torch.nn.Module, weights: Mapping[str, Tensor], origin: Path) -> None:
    """Give ``module`` the ``weights`` of the file ``origin``, all and no more; ValueError names what does not fit."""
    own = module.state_dict()
    _refuse_differences(own.keys() - weights.keys(), weights.keys() - own.keys(), origin)
    try:
        module.load_state_dict(dict(weights))
    except RuntimeError as error:
        raise ValueError(f"{origin} does not fit the model: {error}; give one that this reward is made for") from error


def _refuse_differences(missing: Iterable[str], unexpected: Iterable[str], origin: Path) -> None:
    missing, unexpected = sorted(missing), sorted(name for name in unexpected if not name.endswith(_HARMLESS))
    if missing or unexpected:
        raise ValueError(
            f"{origin} lacks {_first_of(missing)} and has {_first_of(unexpected)} that the model does not know; "
            "give the checkpoint that this reward is made for"
        )


def _first_of(names: list[str]) -> str:
    return f"{', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}" if names else "nothing"
