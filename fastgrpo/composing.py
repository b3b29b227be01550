"""What Hydra makes of ``configs/<name>.yaml`` and a line's overrides, unchecked, and which groups it chooses from."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from threading import Lock
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf, open_dict

_CONFIGS = "fastgrpo_configs"
_composing = Lock()


def config_files() -> Path:
    """The directory of the configs, as it is installed."""
    return Path(str(files(_CONFIGS)))


def compose_config(name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """What Hydra makes of ``configs/<name>.yaml`` and the overrides, unchecked."""
    return deepcopy(composed(name, tuple(overrides))[0])


# one command composes the same choices several times
@lru_cache(maxsize=16)
def composed(name: str, overrides: tuple[str, ...]) -> tuple[DictConfig, dict[str, str]]:
    """The config, which must not be changed, and the option of each group."""
    with _hydra_of_its_own(), initialize_config_module(_CONFIGS, version_base="1.3"):
        config = compose(name, overrides=list(overrides), return_hydra_config=True)
    choices: Any = OmegaConf.to_container(config.hydra.runtime.choices)
    chosen = {group: option for group, option in choices.items() if option and not group.startswith("hydra/")}
    with open_dict(config):
        del config["hydra"]
    if "recipe" in config and config.recipe is None:
        config.recipe = chosen.get("experiment") or chosen["algorithm"]
    return config, chosen


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
    top = config_files()
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
