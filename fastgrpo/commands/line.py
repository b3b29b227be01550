"""From the words after a command's name, ``key=value``, to its config, with the model of the run that they name."""

from collections.abc import Sequence

from omegaconf import DictConfig

from fastgrpo.config import load_config
from fastgrpo.mistakes import no_setting

FLAGS = ("--help", "--dry-run")


def config_of(name: str, overrides: Sequence[str]) -> DictConfig:
    """The checked config of the command ``name``; ValueError for what is no setting."""
    check_words(name, overrides)
    config = load_config(name, overrides)
    if "run" not in config or "model" not in config:
        return config
    # this takes seconds to import, and a mistyped key is told at once
    from fastgrpo.commands.trained import with_run

    return with_run(config, overrides)


def check_words(name: str, overrides: Sequence[str]) -> None:
    """ValueError for a word that is no setting, whatever its key."""
    for override in overrides:
        if not isinstance(override, str):
            raise ValueError(f"{override!r} is not a setting; write each as a text, 'key=value'")
        if override.startswith("-") or ("=" not in override and not override.startswith("~")):
            raise ValueError(no_setting(override, name, FLAGS))
