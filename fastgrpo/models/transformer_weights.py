"""A transformer that takes the place of its pipeline's: one file, as fine-tunes are handed on, or a directory.

All that can be told from names and shapes is told from headers, before gigabytes are read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any, get_type_hints

import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fastgrpo.files.hub import HubId
from fastgrpo.models.families import of_transformer, of_weights
from fastgrpo.models.weight_files import read_header, some, variants, weight_files
from fastgrpo.models.weights import SINGLE_FILES, read_config

_KEY = "model.transformer"
_MAX_QUOTED = 200
# what a checkpoint with text encoders and autoencoder in it puts before the names of the transformer's weights
_PREFIX = "model.diffusion_model."
_LORA = ("lora_A.", "lora_B.", "lora_up.", "lora_down.", ".lokr_", ".hada_")
# the borders of a transformer to its text encoders and its autoencoder
_BORDERS = ("in_channels", "joint_attention_dim", "pooled_projection_dim", "cap_feat_dim", "context_in_dim")
Shapes = Mapping[str, tuple[int, ...]]


def find_transformer(
    path: str, pipeline_class: Any, pipeline: Path, variant: str | None
) -> "TransformerFile | TransformerDirectory":
    """The transformer at a path, checked against what a pipeline of the class, in that directory, can take.

    ``path`` is a .safetensors file, a directory with a transformer or a pipeline in it, or the hub id of such a one.
    ValueError if it is none of these, or holds another transformer or not the whole of one.
    """
    transformer_class = transformer_class_of(pipeline_class)
    place = Path(path).expanduser()
    if place.is_file() or (path.endswith(SINGLE_FILES) and not place.is_dir()):
        if not place.is_file() or place.suffix not in (".safetensors", ".sft"):
            why = "is not a .safetensors file" if place.is_file() else f"is not here ({place.absolute()})"
            raise ValueError(f"{_KEY}={path} {why}; give a .safetensors file or a directory that exists")
        found: TransformerFile | TransformerDirectory = TransformerFile(place, transformer_class, pipeline)
    else:
        # Path("") would be the working directory
        if not path or not place.is_dir():
            place = _download(path, variant, place.absolute())
        inside = place / "transformer"
        place = inside if (inside / "config.json").is_file() else place
        found = TransformerDirectory(place, transformer_class, pipeline, variant)
    found.check()
    return found


def transformer_class_of(pipeline_class: Any) -> Any:
    return get_type_hints(pipeline_class.__init__)["transformer"]


def refuse_other_class(
    config: Mapping[str, Any], path: Path, transformer_class: Any, key: str = "model.weights"
) -> None:
    """ValueError for the config of a transformer of another class."""
    found = config.get("_class_name")
    if found != transformer_class.__name__:
        family = of_transformer(str(found))
        remedy = f"take model={family.model} for it" if family else "give the weights of another model"
        raise ValueError(f"{key}: {path} is of a {found}, not of a {transformer_class.__name__}; {remedy}")


@dataclass(frozen=True)
class TransformerFile:
    """One .safetensors file, in diffusers' layout or in the original one; its sizes are those of the pipeline's."""

    path: Path
    transformer_class: Any
    pipeline: Path

    @property
    def config(self) -> dict[str, Any]:
        return read_config(self._config_path)

    def check(self) -> None:
        refuse_other_class(self.config, self._config_path, self.transformer_class)
        stored = _without_prefix(read_header(self.path, _KEY))
        expected = shapes_of(self.transformer_class, self.config)
        if not _difference(stored, expected):
            return
        _refuse_other_weights(self.path, stored, expected, self.transformer_class)
        if difference := self._difference_of_either_layout(stored, expected):
            raise ValueError(
                f"{_KEY}: {self.path} {difference}; it must hold all weights of a {self.transformer_class.__name__} "
                f"of {self._config_path}, so give the model that it was made from as model.weights"
            )

    def load(self, dtype: torch.dtype) -> nn.Module:
        with safe_open(self.path, framework="pt") as file:
            names = _without_prefix({name: name for name in file.keys()})  # noqa: SIM118
            tensors = {name: file.get_tensor(stored_as) for name, stored_as in names.items()}
        before = torch.get_default_dtype()
        # as from_pretrained does; the argument dtype= would round what is computed and not stored as well
        torch.set_default_dtype(dtype)
        try:
            module: nn.Module = self.transformer_class.from_single_file(
                tensors, config=str(self.pipeline), subfolder="transformer", local_files_only=True
            )
        except (OSError, ValueError, RuntimeError, KeyError, IndexError) as error:
            raise ValueError(f"{_KEY}: {self.path} cannot be loaded ({_short(error)}); give another file") from error
        finally:
            torch.set_default_dtype(before)
        stored = module.state_dict()
        for name, buffer in module.named_buffers():
            if name in stored and buffer.is_floating_point():
                buffer.data = buffer.to(dtype)
        return module

    @property
    def _config_path(self) -> Path:
        return self.pipeline / "transformer" / "config.json"

    def _difference_of_either_layout(self, stored: Shapes, expected: Shapes) -> str:
        """How it differs in the layout that it is nearer to, where it is not what is expected as it stands."""
        as_it_is = len(stored.keys() ^ expected.keys())
        try:
            converted = self._converted(stored)
        except (KeyError, IndexError, ValueError, RuntimeError) as error:
            if as_it_is < len(expected):
                return _difference(stored, expected)
            return f"lacks or misnames {error}" if isinstance(error, KeyError) else f"cannot be read ({_short(error)})"
        is_ours = as_it_is < len(converted.keys() ^ expected.keys())
        return _difference(stored if is_ours else converted, expected)

    def _converted(self, stored: Shapes) -> Shapes:
        """What diffusers makes of these weights, and what it leaves over; no number is read."""
        empty: dict[str, Tensor] = {name: torch.empty(shape, device="meta") for name, shape in stored.items()}
        convert = SINGLE_FILE_LOADABLE_CLASSES[self.transformer_class.__name__]["checkpoint_mapping_fn"]
        converted = convert(config=self.config, checkpoint=empty)
        return {name: tuple(tensor.shape) for name, tensor in (empty | converted).items()}


@dataclass(frozen=True)
class TransformerDirectory:
    """A directory that ``save_pretrained`` of a transformer wrote; its sizes are its own."""

    path: Path
    transformer_class: Any
    pipeline: Path
    variant: str | None

    @property
    def config(self) -> dict[str, Any]:
        return read_config(self.path / "config.json", "give a directory that save_pretrained wrote", _KEY)

    def check(self) -> None:
        config = self.config
        refuse_other_class(config, self.path / "config.json", self.transformer_class, _KEY)
        base = self.pipeline / "transformer" / "config.json"
        if base.is_file():
            whole = read_config(base)
            for name in _BORDERS:
                if name in whole and name in config and whole[name] != config[name]:
                    raise ValueError(
                        f"{_KEY}: {self.path} has {name}={config[name]}, and {self.pipeline} has {whole[name]}; give "
                        "the model that it was made from as model.weights"
                    )
        files = [path for path in weight_files(self.path, self.variant) if path.suffix == ".safetensors"]
        if not files:
            names = sorted(filter(None, variants(path.name for path in self.path.iterdir())))
            remedy = f"set model.variant to {' or '.join(names)}" if names else "give a directory that has them"
            raise ValueError(f"{_KEY}: {self.path} has no diffusion_pytorch_model*.safetensors; {remedy}")
        stored = {name: shape for path in files for name, shape in read_header(path, _KEY).items()}
        if difference := _difference(stored, shapes_of(self.transformer_class, config)):
            raise ValueError(f"{_KEY}: {self.path} {difference}; give the weights of a whole model")

    def load(self, dtype: torch.dtype) -> nn.Module:
        # a variant that is not there is not asked for: the plain weights are then what was checked
        has_variant = self.variant in variants(path.name for path in self.path.iterdir())
        try:
            module: nn.Module = self.transformer_class.from_pretrained(
                self.path, torch_dtype=dtype, variant=self.variant if has_variant else None, local_files_only=True
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{_KEY}: {self.path} cannot be loaded ({_short(error)}); download it again") from error
        return module


def _download(path: str, variant: str | None, looked_for: Path) -> Path:
    found = HubId.parse(path)
    if found is None:
        raise ValueError(
            f"{_KEY}={path!r} is neither a file nor a directory here ({looked_for}) nor the id of a model on the hub; "
            "give a .safetensors file, a directory, or owner/name or owner/name@revision"
        )
    weights = ["", "-?????-of-?????"] + ([] if variant is None else [f".{variant}", f".{variant}-?????-of-?????"])
    names = ["config.json", "*.index*.json", *(f"diffusion_pytorch_model{end}.safetensors" for end in weights)]
    try:
        return found.download([f"{folder}{name}" for folder in ("", "transformer/") for name in names])
    except (OSError, ValueError) as error:
        raise ValueError(found.why_not(error, _KEY)) from error


def _without_prefix(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The transformer's part of what a file holds, under the names of the transformer."""
    inside = {name.removeprefix(_PREFIX): value for name, value in stored.items() if name.startswith(_PREFIX)}
    return inside or dict(stored)


def shapes_of(transformer_class: Any, config: Mapping[str, Any]) -> Shapes:
    """Of all weights of a transformer with this config."""
    with torch.device("meta"):
        module = transformer_class.from_config(config)
    return {name: tuple(weight.shape) for name, weight in module.state_dict().items()}


def _difference(stored: Shapes, expected: Shapes) -> str:
    """How the weights that are stored differ from those that are expected, in words; nothing if they do not."""
    for name, shape in expected.items():
        if stored.get(name, shape) != shape:
            return f"has {name} with the shape {list(stored[name])} and not {list(shape)}"
    if missing := sorted(expected.keys() - stored.keys()):
        return f"lacks {some(missing)}"
    if unknown := sorted(stored.keys() - expected.keys()):
        return f"has {some(unknown)} as well, which that model has not"
    return ""


def _refuse_other_weights(path: Path, stored: Shapes, expected: Shapes, transformer_class: Any) -> None:
    """ValueError for a file of something else, by the names of its weights."""
    name = transformer_class.__name__
    if any(part in weight for weight in stored for part in _LORA):
        raise ValueError(f"{_KEY}: {path} is a LoRA, and not the weights of a {name}; merge it into its model first")
    family = of_weights(stored)
    if family is not None and family.transformer != name:
        raise ValueError(
            f"{_KEY}: {path} is of a {family.transformer}, not of a {name}; take model={family.model} for it"
        )
    if family is None and not stored.keys() & expected.keys():
        raise ValueError(
            f"{_KEY}: {path} holds no {name}, but {some(sorted(stored))}; give the file of a transformer of this model"
        )


def _short(error: Exception) -> str:
    return shorten(str(error), _MAX_QUOTED, placeholder=" ...")
