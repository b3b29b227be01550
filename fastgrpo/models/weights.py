"""Where the weights of a pipeline are, and whether what was loaded of them is whole."""

import json
import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors import SafetensorError

from fastgrpo.files.hub import HubId
from fastgrpo.files.locations import resolve_path
from fastgrpo.models.families import has_parts_of, where_it_goes
from fastgrpo.models.weight_files import read_header, some, variants, weight_files

_KEY = "model.weights"
_INDEX = "model_index.json"
_MIN_VOCABULARY = 32
_MAX_QUOTED = 200
# parts that diffusers fills with random numbers, without an error, where their files lack a weight
_PARTS = ("transformer", "vae")
SINGLE_FILES = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
_log = logging.getLogger(__name__)


def pipeline_directory(pipeline_class: Any, weights: str, variant: str | None = None) -> Path:
    """The directory of a pipeline of the class; of a hub id the one that it is downloaded to.

    ``weights`` is a directory, owner/name or owner/name@revision, or ``pkg://package/path``, a directory inside a
    package.  Of a hub id the files of the variant are downloaded.  ValueError if it is none of these, cannot be
    downloaded, or holds something else.
    """
    directory = _package_directory(weights) if weights.startswith("pkg://") else Path(weights).expanduser()
    if weights.endswith(SINGLE_FILES) and not directory.is_dir():
        raise ValueError(
            f"{_KEY}={weights} is one file, and a pipeline has text encoders and an autoencoder as well; give the "
            f"directory or id of the model that it was made from as {_KEY}, and model.transformer={weights}"
        )
    # Path("") would be the working directory
    if not weights or not directory.is_dir():
        directory = _download(pipeline_class, weights, variant, directory.absolute())
    found = read_config(directory / _INDEX, "give a directory that pipeline.save_pretrained wrote").get("_class_name")
    wanted = pipeline_class.__name__
    if not has_parts_of(str(found), wanted):
        raise ValueError(
            f"{_KEY}={weights}: {directory / _INDEX} is of a {found}, not of a {wanted}; "
            f"{where_it_goes(str(found), wanted)}"
        )
    return directory


def read_config(path: Path, remedy: str = "download it again", key: str = _KEY) -> dict[str, Any]:
    """A JSON file of a pipeline; ValueError, under the config's key, if it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise ValueError(f"{key}: {path} {why}; {remedy}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{key}: {path} is not the config of a pipeline; {remedy}")
    return content


def refuse_missing_parts(directory: Path, parts: Sequence[str], without: Collection[str], variant: str | None) -> None:
    """ValueError if the pipeline lacks one of these parts of weights, or a tokenizer or scheduler that it names.

    Told from names alone.  ``without`` are parts that nobody wants.  A part without the variant has plain files,
    which are read then, as diffusers does; no part at all with it is an error.
    """
    index = read_config(directory / _INDEX)
    named = [name for name, entry in index.items() if isinstance(entry, list) and entry and isinstance(entry[0], str)]
    for part in dict.fromkeys((*parts, *named)):
        if part not in without and not (directory / part).is_dir():
            # an exported pipeline may have been trained without
            remedy = ", or set model.use_t5=false" if part.endswith("_3") else ""
            raise ValueError(f"{_KEY}: {directory} has no {part}; give the directory of a whole pipeline{remedy}")
    plain = []
    for part in parts:
        found = variants(path.name for path in (directory / part).iterdir())
        if not found:
            raise ValueError(f"{_KEY}: {directory / part} has no weights; its files are missing: download it again")
        if not weight_files(directory / part, variant):
            raise ValueError(_no_such_variant(f"{_KEY}: {directory / part}", variant, found))
        if variant not in found:
            plain.append(part)
    if len(plain) == len(parts) > 0:
        found = variants(path.name for part in parts for path in (directory / part).iterdir())
        raise ValueError(_no_such_variant(f"{_KEY}: {directory}", variant, found))
    if plain:
        _log.warning("%s has no model.variant=%s of %s, of which the plain weights are read", directory, variant, plain)


def refuse_damaged_files(directory: Path, parts: Sequence[str], variant: str | None = None) -> None:
    """ValueError for a file of weights of these parts that is not whole; told from its header, in milliseconds."""
    for path in [path for part in parts for path in weight_files(directory / part, variant)]:
        if path.suffix == ".safetensors":
            read_header(path, _KEY)


def load_pipeline(
    pipeline_class: Any,
    directory: Path,
    dtype: torch.dtype,
    decode_dtype: torch.dtype,
    variant: str | None = None,
    **components: Any,
) -> Any:
    """A diffusers pipeline with its autoencoder in ``decode_dtype``; ``components`` take the place of stored ones.

    ValueError for weights that cannot be loaded or are not whole.
    """
    try:
        pipeline = pipeline_class.from_pretrained(
            directory, dtype={"default": dtype, "vae": decode_dtype}, variant=variant, **components
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = shorten(str(error), _MAX_QUOTED, placeholder=" ...")
        raise ValueError(
            f"{_KEY}: {directory} cannot be loaded ({reason}); its files are missing or do not belong together: "
            "download it again"
        ) from error
    _refuse_hollow_tokenizers(directory, pipeline)
    _refuse_random_weights(directory, pipeline, [part for part in _PARTS if part not in components], variant)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _package_directory(weights: str) -> Path:
    try:
        return Path(resolve_path(weights))
    except ValueError as error:
        raise ValueError(f"{_KEY}={error}") from error


def _download(pipeline_class: Any, weights: str, variant: str | None, looked_for: Path) -> Path:
    found = HubId.parse(weights)
    if found is None:
        raise ValueError(
            f"{_KEY}={weights!r} is neither a directory here ({looked_for}) nor the id of a model on the hub; give a "
            "directory that exists, or owner/name, or owner/name@revision"
        )
    try:
        directory = Path(pipeline_class.download(found.repository, revision=found.revision, variant=variant))
    except (OSError, ValueError) as error:
        # diffusers has no exception of its own for it
        if variant is not None and "no such modeling files" in str(error):
            on_hub = _variants_on_hub(found)
            raise ValueError(_no_such_variant(f"{_KEY}={weights}", variant, on_hub)) from error
        raise ValueError(found.why_not(error, _KEY)) from error
    if variant is None and not weight_files(directory / "transformer", None) and (on_hub := _variants_on_hub(found)):
        raise ValueError(_no_such_variant(f"{_KEY}={weights}", variant, on_hub))
    return directory


def _variants_on_hub(found: HubId) -> Collection[str | None]:
    """Those of which a repository has weights; none where the hub does not answer."""
    try:
        names = found.file_names()
    except OSError:
        return ()
    return variants(name.rpartition("/")[2] for name in names)


def _no_such_variant(where: str, wanted: str | None, found: Collection[str | None]) -> str:
    """That there are no weights of the variant, and of which there are some."""
    names = sorted(name for name in found if name is not None)
    choices = [f"model.variant={name}" for name in names] + ["model.variant=null"] * (None in found)
    lacks = "plain weights" if wanted is None else f"weights of model.variant={wanted}"
    return f"{where} has no {lacks}; set {' or '.join(choices) or 'model.variant to one that it has'}"


def _refuse_hollow_tokenizers(directory: Path, pipeline: Any) -> None:
    """ValueError for a tokenizer without words: transformers makes one, without an error, where files are missing."""
    for name, part in pipeline.components.items():
        if name.startswith("tokenizer") and part is not None and len(part) < _MIN_VOCABULARY:
            raise ValueError(
                f"{_KEY}: {directory / name} has {len(part)} words; its files are missing: download it again"
            )


def _refuse_random_weights(directory: Path, pipeline: Any, parts: Sequence[str], variant: str | None) -> None:
    """ValueError for a part of which the files lack a weight."""
    for name in parts:
        part = pipeline.components.get(name)
        paths = [path for path in weight_files(directory / name, variant) if path.suffix == ".safetensors"]
        if part is None or not paths:
            continue
        stored = {weight for path in paths for weight in read_header(path, _KEY)}
        if missing := sorted(part.state_dict().keys() - stored):
            raise ValueError(f"{_KEY}: {directory / name} lacks {some(missing)}; give the weights of a whole model")
