"""Files of a LoRA that was trained elsewhere: scale, A and B of each layer of a transformer, in whichever format.

    diffusers   pytorch_lora_weights.safetensors   transformer.LAYER.lora_A.weight         alpha in the file's metadata
    peft        adapter_model.safetensors          base_model.model.LAYER.lora_A.weight    alpha in adapter_config.json
    kohya       any.safetensors                    lora_unet_LAYER.lora_down.weight        lora_unet_LAYER.alpha
    ComfyUI     any.safetensors                    diffusion_model.LAYER.lora_A.weight     diffusion_model.LAYER.alpha

scale is alpha / rank of the layer, alpha / sqrt(rank) where peft says use_rslora, 1 where there is no alpha.  Layers of
the layout of a model's authors get diffusers' names by diffusers' own converters.
"""

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from fastgrpo.models.added_lora import AddedLoRA, LayerTerm
from fastgrpo.models.lora_writing import DIFFUSERS_FILE, PEFT_CONFIG, PEFT_FILE
from fastgrpo.models.quiet import errors_alone
from fastgrpo.models.weight_files import read_header, some
from fastgrpo.models.weights import SINGLE_FILES, read_config

_NAMED = (DIFFUSERS_FILE, PEFT_FILE)
_METADATA = "lora_adapter_metadata"
_WEIGHT = re.compile(
    r"(?P<layer>.+?)\.(?:alpha|(?P<part>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up|down|up)"
    r"(?:\.default)?\.weight)"
)
_PARTS = {"lora_A": "A", "lora_down": "A", "lora.down": "A", "down": "A", None: "alpha"}
_PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.", "lora_unet_", "lora_transformer_")
_TEXT_ENCODERS = ("text_encoder", "lora_te")
# of peft, what else than W + scale B A an adapter means: DoRA, and starts that change W
_OTHER_STARTS = ("pissa", "olora", "corda")
_MAX_QUOTED = 200
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Source:
    """A file, and the key of the config that named it."""

    path: Path
    key: str

    def __str__(self) -> str:
        return f"{self.key}: {self.path}"


def read_lora(
    lora: str, pipeline_class: Any, model: str, shapes: Mapping[str, tuple[int, ...]], key: str = "lora"
) -> AddedLoRA:
    """The LoRA at a path for a ``model`` whose weights have these shapes; ValueError for another or for none.

    ``lora`` is a directory that has the file of diffusers or of peft, itself or in its directory ``lora``, or a
    .safetensors file.  ``key`` is that of the config, which errors name.
    """
    source = _Source(_find(lora, key), key)
    _refuse_other_weights(source, read_header(source.path, key))
    config = _adapter_config(source)
    tensors, known = load_file(source.path), {name.removesuffix(".weight"): shape for name, shape in shapes.items()}
    terms: Mapping[str, LayerTerm] = _terms(source, tensors, config)
    layers = _named(terms, known)
    if not layers.keys() <= known.keys():
        terms = _converted(source, pipeline_class, tensors, terms)
        layers = _named(terms, known)
    if len(layers) < len(terms):
        raise ValueError(f"{source} names a layer in two ways, as {some(terms)}; write it anew with one")
    _refuse_other_layers(source, model, layers, known)
    return AddedLoRA(layers)


def _find(lora: str, key: str) -> Path:
    place = Path(lora).expanduser()
    if not place.exists():
        raise ValueError(f"{key}={lora} is not here ({place.absolute()}); give a directory or a .safetensors file")
    if place.is_file():
        if place.suffix not in (".safetensors", ".sft"):
            raise ValueError(_no_safetensors(_Source(place, key)))
        return place
    for path in (directory / name for directory in (place, place / "lora") for name in _NAMED):
        if path.is_file():
            return path
    files = sorted(path for path in place.iterdir() if path.suffix in SINGLE_FILES)
    safe = [path for path in files if path.suffix in (".safetensors", ".sft")]
    if len(safe) > 1:
        raise ValueError(f"{key}={lora} has {some(path.name for path in safe)}; give one of them, {key}={safe[0]}")
    if files and not safe:
        raise ValueError(_no_safetensors(_Source(files[0], key)))
    if not files:
        raise ValueError(f"{key}={lora} has neither {' nor '.join(_NAMED)}; give a directory or a file of a LoRA")
    return safe[0]


def _no_safetensors(source: _Source) -> str:
    path, written = source.path, source.path.with_suffix(".safetensors")
    return (
        f"{source} is no .safetensors file, and a pickle can run code; write its weights into one, by "
        f"safetensors.torch.save_file(torch.load('{path}', weights_only=True), '{written}')"
    )


def _refuse_other_weights(source: _Source, names: Iterable[str]) -> None:
    """ValueError for a file with anything but factors of a transformer's layers."""
    names = sorted(names)
    others = [name for name in names if not _WEIGHT.fullmatch(name)]
    if len(others) == len(names):
        raise ValueError(
            f"{source} is no LoRA, it holds {some(others) or 'nothing'}; whole weights are given as model.transformer"
        )
    if encoders := [name for name in names if name.startswith(_TEXT_ENCODERS)]:
        raise ValueError(
            f"{source} changes text encoders too, by {some(encoders)}, and is taken for a transformer alone; add "
            "it by diffusers' load_lora_weights, fuse_lora and save_pretrained, and give model.weights=DIRECTORY"
        )
    if others:
        raise ValueError(
            f"{source} has {some(others)} beside its factors, as DoRA, LoKr, LoHa and trained biases have, which "
            "are not read; add it to its model where it was trained, and give that as model.transformer"
        )


def _adapter_config(source: _Source) -> dict[str, Any]:
    """What peft or diffusers say of the adapter beside its factors, under peft's keys."""
    if source.path.name == PEFT_FILE:
        config = read_config(source.path.with_name(PEFT_CONFIG), "it has the alpha: copy it there", source.key)
    else:
        with safe_open(source.path, framework="pt") as file:
            written = (file.metadata() or {}).get(_METADATA, "{}")
        try:
            config = {key.removeprefix("transformer."): value for key, value in json.loads(written).items()}
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{source} has metadata that cannot be read ({error}); write it anew") from error
    is_dora, start = config.get("use_dora"), config.get("init_lora_weights")
    if is_dora or str(start).startswith(_OTHER_STARTS) or config.get("peft_type", "LORA") != "LORA":
        what = "DoRA" if is_dora else f"of peft_type {config.get('peft_type', 'LORA')}, init_lora_weights {start}"
        raise ValueError(f"{source} is {what}, more than a product added to weights; merge it with peft first")
    return config


def _terms(source: _Source, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, LayerTerm]:
    """By the layers' names in the file."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _WEIGHT.fullmatch(name)
        assert match is not None
        found.setdefault(match["layer"], {})[_PARTS.get(match["part"], "B")] = tensor
    terms = {}
    for layer, parts in found.items():
        if not {"A", "B"} <= parts.keys() or not _are_factors(parts["A"], parts["B"]):
            shapes = ", ".join(f"{part} {list(parts[part].shape)}" for part in sorted(parts))
            raise ValueError(f"{source} has of {layer} {shapes}, not A [R, I] and B [O, R]; download it again")
        try:
            scale = _scale(layer, len(parts["A"]), parts.get("alpha"), config)
        # what others wrote: a pattern may be no pattern, and an alpha no number
        except (re.error, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError) as error:
            raise ValueError(f"{source} has no alpha of {layer} ({error}); write it anew") from error
        if not all(bool(part.float().isfinite().all()) for part in parts.values()) or not math.isfinite(scale):
            raise ValueError(f"{source} has numbers of {layer} that are not finite; get one that has not")
        terms[layer] = LayerTerm(parts["A"], parts["B"], scale)
    return terms


def _are_factors(a_RI: Tensor, b_OR: Tensor) -> bool:
    """Of a linear layer, or of a convolution, of which A has the kernel and B has none."""
    return min(a_RI.ndim, b_OR.ndim) > 1 and b_OR.shape[1] == len(a_RI) and b_OR.numel() == len(b_OR) * len(a_RI)


def _scale(layer: str, rank: int, alpha: Tensor | None, config: Mapping[str, Any]) -> float:
    if alpha is not None:
        return float(alpha) / rank
    if config.get("lora_alpha") is None:
        return 1.0
    patterns = config.get("alpha_pattern") or {}
    of_layer = patterns.get(get_pattern_key(patterns.keys(), _bare(layer)), config["lora_alpha"])
    return float(of_layer) / (rank**0.5 if config.get("use_rslora") else rank)


def _named(terms: Mapping[str, LayerTerm], known: Iterable[str]) -> dict[str, LayerTerm]:
    """Under the transformer's own names, where it has such layers; kohya's names have _ in the place of dots."""
    flat = {name.replace(".", "_"): name for name in known}
    return {flat.get(_bare(layer).replace(".", "_"), layer): term for layer, term in terms.items()}


def _bare(layer: str) -> str:
    """Without what a format puts before all names."""
    prefix = next((prefix for prefix in _PREFIXES if layer.startswith(prefix)), "")
    return layer.removeprefix(prefix)


def _converted(
    source: _Source, pipeline_class: Any, tensors: Mapping[str, Tensor], terms: Mapping[str, LayerTerm]
) -> Mapping[str, LayerTerm]:
    """Under diffusers' names, where its converters know those of the file; as they are where they do not."""
    given = {}
    for name, tensor in tensors.items():
        match = _WEIGHT.fullmatch(name)
        assert match is not None
        part, term = _PARTS.get(match["part"], "B"), terms[match["layer"]]
        # not every converter reads every alpha: what they are given has a scale of 1
        by_part = {"A": tensor.float(), "B": term.scale * tensor.float(), "alpha": torch.tensor(float(term.rank))}
        given[name] = by_part[part]
    try:
        with errors_alone():
            found = pipeline_class.lora_state_dict(given, return_alphas=True)
    # a pipeline without LoRA, and whatever a converter says of names and sizes that it does not know
    except (AttributeError, LookupError, ValueError, TypeError, RuntimeError, AssertionError) as error:
        _log.info(
            "diffusers does not convert %s (%s)", source.path, shorten(str(error), _MAX_QUOTED, placeholder=" ...")
        )
        return terms
    converted = _terms(source, found[0] if isinstance(found, tuple) else found, {})
    if len(converted) < len(terms):
        raise ValueError(
            f"{source} has {len(terms)} layers, of which diffusers reads {len(converted)}; write it anew with "
            "diffusers' names, transformer.LAYER.lora_A.weight"
        )
    return converted


def _refuse_other_layers(
    source: _Source, model: str, layers: Mapping[str, LayerTerm], known: Mapping[str, tuple[int, ...]]
) -> None:
    """ValueError for layers that the model has not, or has in another shape."""
    if lacking := [layer for layer in layers if layer not in known]:
        raise ValueError(
            f"{source} is of another model: a {model} lacks {len(lacking)} of its {len(layers)} layers, "
            f"{some(lacking)}; give the model that it was trained on"
        )
    other = [layer for layer, term in layers.items() if term.shape != known[layer]]
    if other:
        shapes = [f"{layer} {list(layers[layer].shape)} and not {list(known[layer])}" for layer in other]
        raise ValueError(
            f"{source} is of another model: {len(other)} of its {len(layers)} layers have other shapes than in "
            f"a {model}, {some(shapes)}; give the model that it was trained on"
        )
