"""From a config's ``_target_`` to the object that it names: the values are compared with the signature first.

Every mistake becomes one ``ValueError`` that names the key, before anything is built.
"""

import inspect
import typing
from collections.abc import Callable, Collection
from importlib import import_module
from pathlib import Path
from types import UnionType
from typing import Any

from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf


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
    for name in map(str, node):
        if name in ("_target_", "_partial_", "_convert_"):
            continue
        if name not in parameters and not takes_any:
            raise ValueError(f"unknown key {key}.{name}; {target.__qualname__} takes {', '.join(parameters) or 'none'}")
        if name in hints and not fits(node[name], hints[name]):
            raise ValueError(f"{key}.{name} must be {_in_words(hints[name])}, got {node[name]!r}")


def _in_words(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) in (typing.Union, UnionType):
        return " or ".join(_in_words(option) for option in typing.get_args(hint))
    return "null" if hint is type(None) else getattr(hint, "__name__", str(hint)).replace("typing.", "")


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value is of a plain type; what is not plain is left to the piece itself."""
    if typing.get_origin(hint) is typing.Literal:
        return value in typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, UnionType):
        return any(fits(value, option) for option in typing.get_args(hint))
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


def build(config: DictConfig) -> Any:
    """The object of a checked config.  A piece's own ValueError comes through as it was raised."""
    return _instantiated(config)


def build_partial(config: DictConfig, *later: str) -> Callable[..., Any]:
    """What makes the object once it is given the arguments ``later``, which do not come from the config."""
    # objects given to instantiate itself would come out as configs: Hydra takes dataclasses for schemas
    make: Callable[..., Any] = _instantiated(config, later, _partial_=True)
    return make


def _instantiated(config: DictConfig, later: Collection[str] = (), **how: bool) -> Any:
    _check_complete(config, later)
    try:
        return instantiate(config, **how)
    except HydraException as error:
        cause = error.__cause__
        if isinstance(cause, ValueError):
            raise cause from None
        raise


def _check_complete(node: Any, later: Collection[str]) -> None:
    """Refuse a piece that lacks a value without default; those of ``later`` do not come from the config."""
    if not OmegaConf.is_dict(node):
        return
    for child in node.values():
        _check_complete(child, ())
    if "_target_" in node:
        target = find_target(str(node["_target_"]), "")
        for name, parameter in inspect.signature(target).parameters.items():
            if (
                parameter.default is parameter.empty
                and not {name} & {*node, *later}
                and "VAR" not in parameter.kind.name
            ):
                raise ValueError(f"{node['_target_']} needs {name}; leave it in the config")


def check_own(node: Any, key: str, source: Path) -> None:
    """Refuse a part of a config read from a run directory that is more than data.

    Each ``_target_`` must be a class that fastgrpo.models defines: other parts of the package import what they are
    told to.
    """
    if isinstance(node, list):
        for index, child in enumerate(node):
            check_own(child, f"{key}[{index}]", source)
    if isinstance(node, str) and "${" in node:
        raise ValueError(f"{source}: {key} is the interpolation {node!r}; the config of a run holds values only")
    if not isinstance(node, dict):
        return
    if "_target_" in node:
        path = str(node["_target_"])
        module = path.rpartition(".")[0]
        found = find_target(path, key) if module.startswith("fastgrpo.models.") else None
        if not inspect.isclass(found) or found.__module__ != module:
            raise ValueError(f"{source}: {key}._target_ is {path!r}, which is not a model or adaptation of fastgrpo")
    for name, child in node.items():
        check_own(child, f"{key}.{name}", source)
