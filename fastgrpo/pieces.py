"""From a config's ``_target_`` to the object that it names: the values are compared with the signature first.

Every mistake becomes one ``ValueError`` that names the key, before anything is built.
"""

import inspect
import typing
from collections.abc import Callable, Collection, Mapping
from types import UnionType
from typing import Any

from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

from fastgrpo.own_code.found import find, is_ours
from fastgrpo.own_code.raised_at import raised_at

Parameters = Mapping[str, inspect.Parameter]
_OF_HYDRA = ("_target_", "_partial_", "_convert_", "_recursive_")


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
    path = str(node["_target_"])
    target = find_target(path, key)
    parameters, hints = _parameters(target, f"{key}._target_={path}"), _hints(target)
    for name in map(str, node):
        if name in _OF_HYDRA:
            continue
        if not _takes(parameters, name):
            what = getattr(target, "__qualname__", path)
            raise ValueError(f"unknown key {key}.{name}; {what} takes {', '.join(parameters) or 'none'}")
        if name in hints and not fits(node[name], hints[name]):
            raise ValueError(f"{key}.{name} must be {_in_words(hints[name])}, got {node[name]!r}")


def leave_out(config: DictConfig, default: DictConfig, line: Collection[str]) -> None:
    """Leave out what a ``_target_`` of the line does not take and the line does not set: keys of the default's piece.

    ``line`` has the keys of the line.
    """
    for key in (key.removesuffix("._target_") for key in line if key.endswith("._target_")):
        node, before = OmegaConf.select(config, key), OmegaConf.select(default, key)
        if not all(OmegaConf.is_dict(one) and "_target_" in one for one in (node, before)):
            continue
        path = str(node["_target_"])
        parameters = _parameters(find_target(path, key), f"{key}._target_={path}")
        for name in [*node]:
            is_set = any(other == f"{key}.{name}" or other.startswith(f"{key}.{name}.") for other in line)
            if name not in _OF_HYDRA and not is_set and not _takes(parameters, str(name)):
                with open_dict(node):
                    del node[name]


def _parameters(target: Any, place: str) -> Parameters:
    if not callable(target):
        raise ValueError(f"{place} is of type {type(target).__name__}, not a class or a function; name one of these")
    try:
        return inspect.signature(target).parameters
    except ValueError as error:
        raise ValueError(f"{place} does not say what it takes; name a class or a function written in Python") from error


def _takes(parameters: Parameters, name: str) -> bool:
    return name in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def _hints(target: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    # names that are imported for type checkers alone; and not all that is called has hints
    except (NameError, AttributeError, TypeError):
        return {}


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
    return find(path, f"{key}._target_".lstrip("."), "my_pieces.MyPiece")


def build(config: DictConfig) -> Any:
    """The object of a checked config.  A piece's own ValueError comes through as it was raised."""
    return _instantiated(config)


def build_partial(config: DictConfig, *later: str) -> Callable[..., Any]:
    """What makes the object once it is given the arguments ``later``, which do not come from the config."""
    # objects given to instantiate itself would come out as configs: Hydra takes dataclasses for schemas
    path = str(config["_target_"])
    parameters = _parameters(find_target(path, ""), path)
    if lacking := [name for name in later if not _takes(parameters, name)]:
        raise ValueError(f"{path} does not take {', '.join(lacking)}, which it is given; add them, or **others")
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
        if _is_users(config):
            where = f", at {line}" if cause is not None and (line := raised_at(cause)) else ""
            raise ValueError(f"{' '.join(str(error).split())}{where}; mend it") from error
        raise


def _is_users(node: Any) -> bool:
    """Whether some of it is code of the user's own."""
    if OmegaConf.is_list(node):
        return any(map(_is_users, node))
    if not OmegaConf.is_dict(node):
        return False
    return not is_ours(str(node.get("_target_", "fastgrpo"))) or any(map(_is_users, node.values()))


def _check_complete(node: Any, later: Collection[str]) -> None:
    """Refuse a piece that lacks a value without default; those of ``later`` do not come from the config."""
    if not OmegaConf.is_dict(node):
        return
    for child in node.values():
        _check_complete(child, ())
    if "_target_" in node:
        path = str(node["_target_"])
        for name, parameter in _parameters(find_target(path, ""), path).items():
            if (
                parameter.default is parameter.empty
                and not {name} & {*node, *later}
                and "VAR" not in parameter.kind.name
            ):
                raise ValueError(f"{path} needs {name}; leave it in the config")
