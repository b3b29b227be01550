"""Files of weights as diffusers and transformers name them, and what their headers say.

A part of a pipeline can hold the same weights more than once: plain, and as *variants* in other precisions.  Variant v
of model.safetensors is model.v.safetensors, or model.v-00001-of-00002.safetensors and so on where it is split.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

# the last group is how older versions of diffusers named split variants
_NAME = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<variant>[\w-]+?))?(?:-\d+-of-\d+)?"
    r"(?:\.(?P<old_variant>\w+))?\.(?:safetensors|bin)"
)
_SHOWN = 3


def variants(names: Iterable[str]) -> dict[str | None, list[str]]:
    """The files of weights among these names, by their variants; None is the plain one."""
    found: dict[str | None, list[str]] = {}
    for name in sorted(names):
        if match := _NAME.fullmatch(name):
            found.setdefault(match["variant"] or match["old_variant"], []).append(name)
    return found


def weight_files(part: Path, variant: str | None) -> list[Path]:
    """The files that a part is read from: of the variant if it has that, else the plain ones."""
    found = variants(path.name for path in part.iterdir()) if part.is_dir() else {}
    return [part / name for name in found.get(variant, found.get(None, []))]


def read_header(path: Path, key: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights in a file, in milliseconds; ValueError, under the config's key, if it is cut."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        size = f"{path.stat().st_size} bytes" if path.exists() else "which is a broken link"
        raise ValueError(
            f"{key}: {path}, {size}, is damaged or cut short ({error}); delete it and download it again"
        ) from error


def some(names: Iterable[str]) -> str:
    """The first of some names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"
