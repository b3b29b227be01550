"""Where the weights of a pipeline are, and whether what was loaded of them is whole."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fastgrpo.files.hub import HubId
from fastgrpo.files.locations import resolve_path

_KEY = "model.weights"
_INDEX = "model_index.json"
_MIN_VOCABULARY = 32
_MAX_QUOTED = 200
# parts that diffusers fills with random numbers, without an error, where their files lack a weight
_PARTS = ("transformer", "vae")
_FILE = re.compile(r"diffusion_pytorch_model(-\d+-of-\d+)?\.safetensors")


def pipeline_directory(pipeline_class: Any, weights: str) -> Path:
    """The directory of a pipeline of the class; of a hub id the one that it is downloaded to.

    ``weights`` is a directory, owner/name or owner/name@revision, or ``pkg://package/path``, a directory inside a
    package.  ValueError if it is none of these, cannot be downloaded, or holds something else.
    """
    directory = _package_directory(weights) if weights.startswith("pkg://") else Path(weights).expanduser()
    # Path("") would be the working directory
    if not weights or not directory.is_dir():
        directory = _download(pipeline_class, weights, directory.absolute())
    found = read_config(directory / _INDEX, "give a directory that pipeline.save_pretrained wrote").get("_class_name")
    family = pipeline_class.__name__.removesuffix("Pipeline")
    # variants of a pipeline, as for image to image, have the same parts
    if not str(found).startswith(family):
        raise ValueError(
            f"{_KEY}={weights}: {directory / _INDEX} is of a {found}, not of a {family}; take model=sd35_medium for "
            "StableDiffusion3, model=flux_dev for Flux"
        )
    return directory


def read_config(path: Path, remedy: str = "download it again") -> dict[str, Any]:
    """A JSON file of a pipeline; ValueError if it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise ValueError(f"{_KEY}: {path} {why}; {remedy}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{_KEY}: {path} is not the config of a pipeline; {remedy}")
    return content


def refuse_damaged_files(directory: Path, parts: Sequence[str]) -> None:
    """ValueError for a file of weights of these parts that is not whole; told from its header, in milliseconds."""
    for path in sorted(path for part in parts for path in (directory / part).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            size = f"{path.stat().st_size} bytes" if path.exists() else "which is a broken link"
            raise ValueError(
                f"{_KEY}: {path}, {size}, is damaged or cut short ({error}); delete it and download it again"
            ) from error


def load_pipeline(
    pipeline_class: Any, directory: Path, dtype: torch.dtype, decode_dtype: torch.dtype, **components: Any
) -> Any:
    """A diffusers pipeline with its autoencoder in ``decode_dtype``; ``components`` take the place of stored ones.

    ValueError for weights that cannot be loaded or are not whole.
    """
    try:
        pipeline = pipeline_class.from_pretrained(
            directory, dtype={"default": dtype, "vae": decode_dtype}, **components
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = shorten(str(error), _MAX_QUOTED, placeholder=" ...")
        raise ValueError(
            f"{_KEY}: {directory} cannot be loaded ({reason}); its files are missing or do not belong together: "
            "download it again"
        ) from error
    _refuse_hollow_tokenizers(directory, pipeline)
    _refuse_random_weights(directory, pipeline)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _package_directory(weights: str) -> Path:
    try:
        return Path(resolve_path(weights))
    except ValueError as error:
        raise ValueError(f"{_KEY}={error}") from error


def _download(pipeline_class: Any, weights: str, looked_for: Path) -> Path:
    found = HubId.parse(weights)
    if found is None:
        raise ValueError(
            f"{_KEY}={weights!r} is neither a directory here ({looked_for}) nor the id of a model on the hub; give a "
            "directory that exists, or owner/name, or owner/name@revision"
        )
    try:
        return Path(pipeline_class.download(found.repository, revision=found.revision))
    except (OSError, ValueError) as error:
        raise ValueError(found.why_not(error, _KEY)) from error


def _refuse_hollow_tokenizers(directory: Path, pipeline: Any) -> None:
    """ValueError for a tokenizer without words: transformers makes one, without an error, where files are missing."""
    for name, part in pipeline.components.items():
        if name.startswith("tokenizer") and part is not None and len(part) < _MIN_VOCABULARY:
            raise ValueError(
                f"{_KEY}: {directory / name} has {len(part)} words; its files are missing: download it again"
            )


def _refuse_random_weights(directory: Path, pipeline: Any) -> None:
    """ValueError for a part of which the files lack a weight."""
    for name in _PARTS:
        part = pipeline.components.get(name)
        paths = [path for path in (directory / name).glob("*.safetensors") if _FILE.fullmatch(path.name)]
        if part is None or not paths:
            continue
        stored: set[str] = set()
        for path in paths:
            with safe_open(path, framework="pt") as file:
                stored |= set(file.keys())
        if missing := sorted(part.state_dict().keys() - stored):
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise ValueError(
                f"{_KEY}: {directory / name} lacks {', '.join(missing[:3])}{more}; give the weights of a whole model"
            )
