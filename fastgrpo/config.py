"""From the command line's overrides to a checked config, and from a config's ``_target_`` to an object.

Every mistake becomes one ``ValueError`` that names the key, before anything is built.
"""

import inspect
import re
import typing
from collections.abc import Mapping, Sequence
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
# keys whose value is a sentence
_TEXT_KEYS = ("prompt",)


def load_config(name: str, overrides: Sequence[str]) -> DictConfig:
    """``configs/<name>.yaml`` with the overrides applied and every interpolation resolved."""
    overrides = [_quoted(override) for override in overrides]
    try:
        config = compose_config(name, overrides)
        OmegaConf.resolve(config)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_explain(error, name)) from error
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ValueError(f"{missing[0]} has no value; give it as {missing[0]}=VALUE")
    groups = config_groups(name)
    default = compose_config(name, [override for override in overrides if _key(override) in groups])
    OmegaConf.resolve(default)
    _check_plain(OmegaConf.to_container(config), OmegaConf.to_container(default), "", name)
    check(config)
    return config


def compose_config(name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """What Hydra makes of ``configs/<name>.yaml`` and the overrides, unchecked."""
    with initialize_config_module(_CONFIGS, version_base="1.3"):
        return compose(name, overrides=list(overrides))


def config_groups(name: str) -> dict[str, list[str]]:
    """The groups of ``configs/<name>.yaml`` and their options: ``{"algorithm/noise": ["elite", ...], ...}``."""
    top = Path(str(files(_CONFIGS)))
    groups: dict[str, list[str]] = {}
    for path in sorted(path for group in _chosen(top, name) for path in (top / group).rglob("*.yaml")):
        groups.setdefault(path.parent.relative_to(top).as_posix(), []).append(path.stem)
    return dict(sorted(groups.items()))


def _chosen(top: Path, name: str) -> list[str]:
    """The groups in the defaults of a config and of those that it builds on."""
    defaults: Any = OmegaConf.to_container(OmegaConf.load(top / f"{name}.yaml").defaults)
    chosen = [next(iter(entry)) for entry in defaults if isinstance(entry, dict)]
    below = [entry for entry in defaults if isinstance(entry, str) and entry != "_self_"]
    return chosen + [group for other in below for group in _chosen(top, other)]


def _key(override: str) -> str:
    """The key of an override, without its sign and its package."""
    return override.lstrip("+~").split("=")[0].split("@")[0]


def _quoted(override: str) -> str:
    """``prompt=...`` is text as it stands: Hydra would read commas and braces in it as lists."""
    key, equals, text = override.partition("=")
    if key not in _TEXT_KEYS or not equals or text[:1] in ("'", '"'):
        return override
    # in Hydra's grammar backslashes count only before a quote
    text = re.sub(r"(\\*)('|$)", lambda match: 2 * match[1] + ("\\'" if match[2] else ""), text)
    return f"{key}='{text}'"


def _explain(error: Exception, name: str) -> str:
    """Hydra's words in one line, and for an unknown key the nearest known ones."""
    text = " ".join(str(error).split()).split(" Config search path:")[0].split(" See https://hydra.cc")[0]
    unknown = re.match(r"Could not override '([^']*)'", text)
    return _unknown(unknown[1], name) if unknown else text


def _unknown(key: str, name: str) -> str:
    """Says that a key is unknown, and which known ones are near in spelling or end alike."""
    known = [*_keys(compose_config(name)), *config_groups(name)]
    if key in known:
        return (
            f"{key} is a key of the default choice of its group, not of the one you took; drop it or take the default"
        )
    last = re.split(r"[./]", key)[-1]
    alike = [other for other in known if re.split(r"[./]", other)[-1] == last]
    near = list(dict.fromkeys(alike + get_close_matches(key, known, n=3, cutoff=0.6)))[:3]
    return f"unknown key {key}; " + (f"did you mean {', '.join(near)}?" if near else f"see fastgrpo {name} --help")


def _keys(config: Any, prefix: str = "") -> list[str]:
    if not OmegaConf.is_dict(config):
        return [prefix]
    children = [_keys(config._get_node(key), f"{prefix}.{key}" if prefix else str(key)) for key in config]
    return [key for child in children for key in child] + ([prefix] if prefix else [])


def _check_plain(value: Any, default: Any, key: str, name: str) -> None:
    """Keys that no piece explains must be those of the default config, and of its types."""
    if not isinstance(default, dict):
        if default is not None and not isinstance(default, list) and not _fits(value, type(default)):
            raise ValueError(f"{key} must be {type(default).__name__}, got {value!r}")
        return
    if "_target_" in default:
        return
    if not isinstance(value, dict):
        raise ValueError(f"{key} has keys of its own, got {value!r}; set {', '.join(f'{key}.{k}' for k in default)}")
    for child in value.keys() | default.keys():
        full = f"{key}.{child}" if key else str(child)
        if child not in default:
            raise ValueError(_unknown(full, name))
        if child not in value:
            raise ValueError(f"{full} must have a value; leave out ~{full}")
        _check_plain(value[child], default[child], full, name)


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
    _check_complete(config, extra)
    try:
        # objects given to instantiate itself would come out as configs: Hydra takes dataclasses for schemas
        return instantiate(config, _partial_=True)(**extra) if extra else instantiate(config)
    except HydraException as error:
        cause = error.__cause__
        if isinstance(cause, ValueError):
            raise cause from None
        raise


def _check_complete(node: Any, extra: Mapping[str, Any]) -> None:
    """Refuse a piece that lacks a value without default; ``extra`` are those that do not come from the config."""
    if not OmegaConf.is_dict(node):
        return
    for child in node.values():
        _check_complete(child, {})
    if "_target_" in node:
        target = find_target(str(node["_target_"]), "")
        for name, parameter in inspect.signature(target).parameters.items():
            if (
                parameter.default is parameter.empty
                and not {name} & {*node, *extra}
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


def resolve_path(path: str) -> str:
    """``pkg://package/inside`` as a path in the installed package; any other path as it is."""
    if not path.startswith("pkg://"):
        return path
    package, _, inside = path.removeprefix("pkg://").partition("/")
    return str(files(package) / inside)
