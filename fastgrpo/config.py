"""From the command line's overrides to a checked config, and from a config's ``_target_`` to an object.

Every mistake becomes one ``ValueError`` that names the key, before anything is built.
"""

import inspect
import typing
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from types import UnionType
from typing import Any

from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

_CONFIGS = "fastgrpo_configs"


def load_config(name: str, overrides: Sequence[str]) -> DictConfig:
    """``configs/<name>.yaml`` with the overrides applied and every interpolation resolved."""
    try:
        with initialize_config_module(_CONFIGS, version_base="1.3"):
            config = compose(name, overrides=list(overrides))
        OmegaConf.resolve(config)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_explain(error, name)) from error
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ValueError(f"{missing[0]} has no value; give it as {missing[0]}=VALUE")
    check(config)
    return config


def _explain(error: Exception, name: str) -> str:
    """Hydra's words in one line, and for an unknown key the nearest known ones."""
    text = " ".join(str(error).split())
    key = getattr(error, "full_key", None) or getattr(error.__cause__, "full_key", None)
    if key and "is not in struct" in text:
        with initialize_config_module(_CONFIGS, version_base="1.3"):
            known = _keys(compose(name))
        near = get_close_matches(key, known, n=3, cutoff=0.5)
        return f"unknown key {key}" + (f"; did you mean {', '.join(near)}?" if near else "; see fastgrpo train --help")
    return text


def _keys(config: Any, prefix: str = "") -> list[str]:
    if not OmegaConf.is_dict(config):
        return [prefix]
    children = [_keys(config._get_node(key), f"{prefix}.{key}" if prefix else str(key)) for key in config]
    return [key for child in children for key in child] + ([prefix] if prefix else [])


def check(node: Any, key: str = "") -> None:
    """Compare each ``_target_`` and its values with the signature it names; ValueError with the full key."""
    if OmegaConf.is_list(node):
        for index, child in enumerate(node):
            check(child, f"{key}[{index}]")
        return
    if not OmegaConf.is_dict(node):
        return
    if "_target_" in node:
        _check_call(node, key)
    for name in node:
        check(node[name], f"{key}.{name}" if key else str(name))


def _check_call(node: DictConfig, key: str) -> None:
    target = find_target(str(node["_target_"]), key)
    parameters = inspect.signature(target).parameters
    hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for name in node:
        if name in ("_target_", "_partial_", "_convert_"):
            continue
        if name not in parameters and not takes_any:
            raise ValueError(f"unknown key {key}.{name}; {target.__qualname__} takes {', '.join(parameters) or 'none'}")
        if name in hints and not _fits(node[name], hints[name]):
            wanted = getattr(hints[name], "__name__", str(hints[name])).replace("typing.", "")
            raise ValueError(f"{key}.{name} must be {wanted}, got {node[name]!r}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain value is of a plain type; what is not plain is left to the piece itself."""
    if typing.get_origin(hint) is typing.Literal:
        return value in typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint in (int, str, bool):
        return type(value) is hint
    return True


def find_target(path: str, key: str) -> Any:
    """The class or function at a dotted path."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{key}._target_: cannot find {path!r} ({error})") from error


def build(config: DictConfig, **extra: Any) -> Any:
    """The object of a checked config.  A piece's own ValueError comes through as it was raised."""
    try:
        # objects given to instantiate itself would come out as configs: Hydra takes dataclasses for schemas
        return instantiate(config, _partial_=True)(**extra) if extra else instantiate(config)
    except HydraException as error:
        cause = error.__cause__
        if isinstance(cause, ValueError):
            raise cause from None
        raise


def check_own(node: Any, source: Path) -> None:
    """Refuse a config read from a run directory that names anything outside this package: it is data, not code."""
    for key in _keys(node):
        if key.endswith("_target_") and not str(OmegaConf.select(node, key)).startswith("fastgrpo."):
            raise ValueError(f"{source}: {key} names {OmegaConf.select(node, key)!r}, which is not a part of fastgrpo")


def resolve_path(path: str) -> str:
    """``pkg://package/inside`` as a path in the installed package; any other path as it is."""
    if not path.startswith("pkg://"):
        return path
    package, _, inside = path.removeprefix("pkg://").partition("/")
    return str(files(package) / inside)
