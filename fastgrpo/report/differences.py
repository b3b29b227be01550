"""In which keys configs differ: those of several runs from each other, that of a single run from the default one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from fastgrpo.composing import compose_config
from fastgrpo.leaves import leaves
from fastgrpo.report.run import Run

# where a run lies, not what it is
_LEFT_OUT = ("name", "output", "resume", "history", "job")
ABSENT = "—"


@dataclass(frozen=True)
class Differences:
    """A line a key that differs: its values, a column each."""

    columns: list[str]
    lines: list[tuple[str, list[str]]]


def differences(runs: Sequence[Run]) -> Differences:
    """Of the runs from each other; of a single one from what ``fastgrpo train`` does by default."""
    configs = {run.name: run.config for run in runs}
    if len(runs) == 1:
        configs = {"default": _default(), **configs}
    found = [dict(leaves(config)) for config in configs.values()]
    lines = []
    for key in dict.fromkeys(key for of_one in found for key in of_one):
        values = [of_one.get(key, ABSENT) for of_one in found]
        if key.split(".")[0] not in _LEFT_OUT and any(value != values[0] for value in values):
            lines.append((key, [str(value) for value in values]))
    return Differences(list(configs), sorted(lines))


def changed_on_the_way(run: Run) -> list[str]:
    """What resumptions changed, and from which iteration on."""
    lines = []
    for entry in run.config.get("history") or []:
        for key, (before, after) in entry["changed"].items():
            lines.append(f"from iteration {entry['after_iteration'] + 1} on: {key} {before} -> {after}")
    return lines


def as_yaml(config: Mapping[str, Any]) -> str:
    """The whole config, as its file has it."""
    return OmegaConf.to_yaml(OmegaConf.create(dict(config)))


def _default() -> dict[str, Any]:
    default: Any = OmegaConf.to_container(compose_config("train"), resolve=True)
    return default
