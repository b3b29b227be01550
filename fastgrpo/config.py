"""From the command line's overrides to a checked config.

A run that goes on keeps the config that it began with, in which the overrides change what they name (``config.yaml`` of
its directory; what may change is decided in ``checkpoints/changes.py``).  Every mistake becomes one ``ValueError`` that
names the key, before anything is built.
"""

from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fastgrpo.composing import compose_config, composed, config_groups
from fastgrpo.files.locations import resolve_path
from fastgrpo.meanings import general_meanings, meaning_of, meanings
from fastgrpo.mistakes import in_words, keys_of, refuse_groups_of_others, unknown_key
from fastgrpo.overrides import (
    TEXT_KEYS,
    beside_targets,
    gathered,
    is_plain,
    key_of,
    line_of,
    of_file,
    quoted,
    switched,
    value_of,
)
from fastgrpo.own_code.begun import settings_of
from fastgrpo.own_code.named import PIECES, check_named
from fastgrpo.pieces import check, fits, leave_out

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
    overrides = _readable(overrides, name, groups)
    overrides = [meant for override in overrides for meant in of_file(override, name, groups)]
    overrides = gathered(
        overrides, [str(key) for key, value in compose_config(name).items() if OmegaConf.is_list(value)]
    )
    try:
        default = _resolved(name, [override for override in overrides if key_of(override) in groups])
        begun = _begun(name, overrides, groups) if name in _RESUMING else None
        config = _continued(begun, name, overrides, groups) if begun else _resolved(name, beside_targets(overrides))
        line = line_of(overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(in_words(error, name)) from error
    if begun:
        check_named(OmegaConf.to_container(config), _config_in(config.output), line, PIECES)
    leave_out(config, default, line)
    if missing := sorted(OmegaConf.missing_keys(config)):
        said = _meaning(missing[0], name, overrides)
        raise ValueError(f"{missing[0]} has no value; give it as {missing[0]}=VALUE{said and f': {said}'}")
    _check_plain(OmegaConf.to_container(config), OmegaConf.to_container(default), "", name)
    check(config)
    return config


def explained_config(name: str, overrides: Sequence[str]) -> tuple[DictConfig, dict[str, str]]:
    """The config under a line's overrides, unchecked and unresolved, and the option of each group.

    Options as ``{"algorithm/noise": "retries", "reward/terms@reward.watch.ocr": "ocr", ...}``.  ValueError for what
    Hydra refuses.
    """
    groups = config_groups(name)
    try:
        config, chosen = composed(name, tuple(beside_targets(_readable(overrides, name, groups))))
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(in_words(error, name)) from error
    return deepcopy(config), dict(chosen)


def _readable(overrides: Sequence[str], name: str, groups: Mapping[str, Sequence[str]]) -> list[str]:
    """The line as Hydra reads it as it was meant."""
    refuse_groups_of_others(map(key_of, overrides), name)
    return [switched(quoted(override), groups) for override in overrides]


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
        return _begun(name, _readable(overrides, name, groups), groups) is not None
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(in_words(error, name)) from error


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
    if "recipe" in default:
        # what a run of an earlier version was called is not known
        config.recipe = begun.get("recipe") or ""
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
        if key not in keys_of(config) and f"++{override}" not in beside_targets(overrides):
            raise ValueError(unknown_key(key, name))
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


def _meaning(key: str, name: str, overrides: Sequence[str]) -> str:
    """Of a key, as help has it."""
    _, chosen = composed(name, tuple(beside_targets(overrides)))
    of_keys, headings = meanings(name, chosen)
    return meaning_of(key, of_keys, general_meanings()) or headings.get(key.partition(".")[0], "")


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
            raise ValueError(unknown_key(full, name))
        if child not in value:
            raise ValueError(f"{full} must have a value; leave out ~{full}")
        _check_plain(value[child], default[child], full, name)
