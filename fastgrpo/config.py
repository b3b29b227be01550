"""From the command line's overrides to a checked config.

A run that goes on keeps the config that it began with, in which the overrides change what they name (``config.yaml`` of
its directory; what may change is decided in ``checkpoints/changes.py``).  Every mistake becomes one ``ValueError`` that
names the key, before anything is built.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from difflib import get_close_matches
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from threading import Lock
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fastgrpo.files.locations import resolve_path
from fastgrpo.overrides import TEXT_KEYS, beside_targets, is_plain, key_of, line_of, of_file, quoted, switched, value_of
from fastgrpo.own_code.begun import settings_of
from fastgrpo.own_code.named import PIECES, check_named
from fastgrpo.pieces import check, fits, leave_out

_CONFIGS = "fastgrpo_configs"
_composing = Lock()
_RESUMING = ("train", "submit")
# groups of which a model chooses another option, as its size wants it; its time grid is another
_BROUGHT = {"compile", "runtime", "adaptation"}
_GRID = "algorithm.schedule"
# caches are the user's own, whoever that is when they are opened
_CACHES = ("cache", "condition_cache", "directory")


def load_config(name: str, overrides: Sequence[str]) -> DictConfig:
    """``configs/<name>.yaml`` with the overrides applied and every interpolation resolved.

    With ``resume=true``, the config that the run in ``output`` began with takes the place of the default one; what it
    would import must be fastgrpo's own or named by an override, and so must a variable whose token it would send.
    """
    groups = config_groups(name)
    overrides = [switched(quoted(override), groups) for override in overrides]
    overrides = [meant for override in overrides for meant in of_file(override, name, groups)]
    try:
        default = _resolved(name, [override for override in overrides if key_of(override) in groups])
        begun = _begun(name, overrides, groups) if name in _RESUMING else None
        config = _continued(begun, name, overrides, groups) if begun else _resolved(name, beside_targets(overrides))
        line = line_of(overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_explain(error, name)) from error
    if begun:
        check_named(OmegaConf.to_container(config), _config_in(config.output), line, PIECES)
    leave_out(config, default, line)
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ValueError(f"{missing[0]} has no value; give it as {missing[0]}=VALUE")
    _check_plain(OmegaConf.to_container(config), OmegaConf.to_container(default), "", name)
    check(config)
    return config


def compose_config(name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """What Hydra makes of ``configs/<name>.yaml`` and the overrides, unchecked."""
    return deepcopy(_composed(name, tuple(overrides)))


# one command composes the same choices several times
@lru_cache(maxsize=16)
def _composed(name: str, overrides: tuple[str, ...]) -> DictConfig:
    with _hydra_of_its_own(), initialize_config_module(_CONFIGS, version_base="1.3"):
        return compose(name, overrides=list(overrides))


@contextmanager
def _hydra_of_its_own() -> Iterator[None]:
    """Hydra is one object of the process, which may be a program of Hydra's, and load configs in several threads."""
    with _composing:
        others = GlobalHydra.instance().hydra
        GlobalHydra.instance().clear()
        try:
            yield
        finally:
            GlobalHydra.instance().hydra = others


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


def _resolved(name: str, overrides: Sequence[str]) -> DictConfig:
    config = compose_config(name, overrides)
    OmegaConf.resolve(config)
    _expand_home(config)
    return config


def _expand_home(node: Any, key: str = "") -> None:
    """Write ``~`` out in every value that is a path."""
    for child in list(node) if OmegaConf.is_dict(node) else range(len(node)):
        # a value that is missing is asked for later
        if OmegaConf.is_missing(node, child):
            continue
        value, name = node[child], str(child) if OmegaConf.is_dict(node) else key
        if OmegaConf.is_config(value):
            _expand_home(value, name)
        elif isinstance(value, str) and value.startswith("~") and name not in (*TEXT_KEYS, *_CACHES):
            node[child] = resolve_path(value)


def goes_on(name: str, overrides: Sequence[str]) -> bool:
    """Whether the overrides go on with a run that has begun, which keeps its config; they need not be right."""
    groups = config_groups(name)
    try:
        return _begun(name, [switched(quoted(override), groups) for override in overrides], groups) is not None
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_explain(error, name)) from error


def _begun(name: str, overrides: Sequence[str], groups: Collection[str]) -> DictConfig | None:
    """The config of the run that the overrides want to go on with, as its directory has it; None if there is none."""
    # a key of the run's own recipe may be unknown to the default one, so only what says where the run is may be asked
    about = [override for override in overrides if key_of(override) in {*groups, "name", "output", "resume"}]
    config = _resolved(name, about)
    path = _config_in(config.output)
    if config.resume is not True or not path.is_file():
        return None
    return OmegaConf.create(settings_of(OmegaConf.to_container(OmegaConf.load(path), resolve=False), path))


def _config_in(output: str) -> Path:
    return Path(str(output)) / "config.yaml"


def _continued(begun: DictConfig, name: str, overrides: Sequence[str], groups: Collection[str]) -> DictConfig:
    """The begun config with the overrides applied: each changes what it names and nothing else."""
    plain = [override for override in overrides if is_plain(override) and key_of(override) not in groups]
    structural = [override for override in overrides if override not in plain]
    default, chosen = _resolved(name, []), _resolved(name, structural)
    # keys that the run's version did not have yet
    config = OmegaConf.merge({key: default[key] for key in default if not _has_target(default[key])}, begun)
    pieces = [OmegaConf.select(one, "adaptation._target_") for one in (default, begun)]
    if pieces[0] == pieces[1] is not None:
        # the run's may have keys that the default one has not
        config.adaptation = {**default.adaptation, **begun.adaptation}
    # a model that is named again does not bring its own of these once more, nor a reward its backend
    _take_differences(config, _without_brought(default), _without_brought(chosen))
    for group in (key_of(override).replace("/", ".") for override in structural if key_of(override) in groups):
        if (subtree := OmegaConf.select(chosen, group)) is not None:
            OmegaConf.update(config, group, subtree, merge=False, force_add=True)
    is_given = any(key_of(override).replace("/", ".").startswith(_GRID) for override in structural)
    # it may be the model's, in the place of which an algorithm that is named again would bring its own
    if not is_given and _pieces(begun) == _pieces(chosen) and (grid := OmegaConf.select(begun, _GRID)) is not None:
        OmegaConf.update(config, _GRID, grid, merge=False)
    if not any(key_of(override) == "reward_backend" for override in structural):
        _keep_backends(config, begun)
    for override in plain:
        key = key_of(override)
        # a key that still has no value is there, though select does not say so
        if key not in _keys(config) and f"++{override}" not in beside_targets(overrides):
            raise ValueError(_unknown(key, name))
        OmegaConf.update(config, key, value_of(override), force_add=True)
    OmegaConf.resolve(config)
    _expand_home(config)
    assert isinstance(config, DictConfig)
    return config


def _pieces(config: Any) -> dict[str, str]:
    """The classes of an algorithm, but for its time grid: another algorithm has others."""
    algorithm = config.get("algorithm") or {}
    return {key: algorithm[key].get("_target_") for key in algorithm if _has_target(algorithm[key])} | {"schedule": ""}


def _without_brought(config: DictConfig) -> DictConfig:
    """The config without what a model chooses."""
    rest = deepcopy(OmegaConf.masked_copy(config, [str(key) for key in config if key not in _BROUGHT]))
    if "algorithm" in rest:
        rest.algorithm.pop("schedule", None)
    return rest


def _take_differences(config: Any, before: Any, after: Any) -> None:
    """Change in ``config`` what differs between two others: what an experiment, or a key with + or ~, changes."""
    for key in {*before, *after}:
        if key not in after:
            config.pop(key, None)
        elif key not in before or before[key] != after[key]:
            if key in before and all(OmegaConf.is_dict(part.get(key)) for part in (before, after, config)):
                _take_differences(config[key], before[key], after[key])
            else:
                config[key] = after[key]


def _keep_backends(config: Any, begun: Any) -> None:
    """Each reward is computed as it was when the run began, whatever is the default by now."""
    for key in begun:
        if key == "backend" and key in config:
            config[key] = begun[key]
        elif OmegaConf.is_dict(begun.get(key)) and OmegaConf.is_dict(config.get(key)):
            _keep_backends(config[key], begun[key])


def _has_target(node: Any) -> bool:
    return OmegaConf.is_dict(node) and "_target_" in node


def _explain(error: Exception, name: str) -> str:
    """Hydra's words in one line, and for an unknown key the nearest known ones."""
    text = " ".join(str(error).split()).split(" Config search path:")[0].split(" See https://hydra.cc")[0]
    unknown = re.match(r"Could not override '([^']*)'", text)
    if unknown:
        return _unknown(unknown[1], name)
    is_grammar = re.search("no viable alternative|mismatched input|extraneous input|token recognition error", text)
    return f"{text}; give a text with such characters in quotes, as output=\"'[a] b'\"" if is_grammar else text


def _unknown(key: str, name: str) -> str:
    """Says that a key is unknown, and which known ones are near in spelling or end alike."""
    known = [*_keys(compose_config(name)), *config_groups(name)]
    if key in known:
        return (
            f"{key} is a key of the default choice of its group, not of the one you took; drop it or take the default"
        )
    parent, _, last = key.rpartition(".")
    if having := [f"{parent}={option}" for option in _options_with(last, parent.replace(".", "/"), name)]:
        return f"unknown key {key}; {' and '.join(having)} {'has' if len(having) == 1 else 'have'} it"
    alike = [other for other in known if re.split(r"[./]", other)[-1] == re.split(r"[./]", key)[-1]]
    siblings = {other.rpartition(".")[2]: other for other in known if parent and other.rpartition(".")[0] == parent}
    near = alike + [siblings[word] for word in get_close_matches(last, siblings, n=3, cutoff=0.6)]
    # a key that is unlike its siblings may be meant for elsewhere, but is not its own group
    elsewhere = [other for other in known if other != parent and other not in siblings.values()]
    near += get_close_matches(key, elsewhere, n=3, cutoff=0.6)
    if near:
        return f"unknown key {key}; did you mean {', '.join(list(dict.fromkeys(near))[:3])}?"
    return f"unknown key {key}; " + (
        f"{parent} has {', '.join(siblings)}" if siblings else f"see fastgrpo {name} --help"
    )


def _options_with(key: str, group: str, name: str) -> list[str]:
    """The options of a group whose files have a key."""
    top = Path(str(files(_CONFIGS)))
    options = config_groups(name).get(group, [])
    return [option for option in options if key in OmegaConf.load(top / group / f"{option}.yaml")]


def _keys(config: Any, prefix: str = "") -> list[str]:
    if not OmegaConf.is_dict(config):
        return [prefix]
    children = [_keys(config._get_node(key), f"{prefix}.{key}" if prefix else str(key)) for key in config]
    return [key for child in children for key in child] + ([prefix] if prefix else [])


def _check_plain(value: Any, default: Any, key: str, name: str) -> None:
    """Keys that no piece explains must be those of the default config, and of its types."""
    if not isinstance(default, dict):
        if default is not None and not isinstance(default, list) and not fits(value, type(default)):
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
