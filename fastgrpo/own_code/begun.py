"""The config that a run began with, as data of the file ``config.yaml``: what a later version takes from it."""

from pathlib import Path
from typing import Any

from fastgrpo.own_code.named import check_values

# what resumptions changed is no setting; a job is the line's, and has lines of shell
_NOT_TAKEN = ("history", "job")
# classes of earlier versions, whose sizes no class of today takes
_GONE = tuple(f"fastgrpo.models.architectures.{name}" for name in ("SD3Architecture", "FluxArchitecture"))


def settings_of(plain: Any, path: Path) -> dict[str, Any]:
    """Of that file as plain data, its settings; ValueError for a run that this version cannot go on with."""
    if not isinstance(plain, dict):
        raise ValueError(f"{path} is not the config of a run; name another directory by output=")
    plain = {key: value for key, value in plain.items() if key not in _NOT_TAKEN}
    check_values(plain, "", path)
    return plain | {"model": of_today(plain["model"], path)} if "model" in plain else plain


def of_today(model: Any, source: Path) -> Any:
    """The plain group ``model`` without an architecture of an earlier version, which is read for random weights alone.

    ValueError where weights are random: those of its sizes and seed are made no more.
    """
    architecture = model.get("architecture") if isinstance(model, dict) else None
    target = architecture.get("_target_") if isinstance(architecture, dict) else None
    if target not in _GONE:
        return model
    if model.get("weights") == "random":
        raise ValueError(
            f"{source}: the run was begun with an earlier version, whose random weights (model.architecture._target_="
            f"{target}) this one does not make, and cannot go on; begin a new one, or use that version"
        )
    return {key: value for key, value in model.items() if key != "architecture"}
