"""One run on all its ranks and after each resumption: one directory, one config, the same weights and rewards.

``config.yaml`` is the config as it holds now.  Under ``history`` it keeps what resumptions changed, each with both
values and the iteration after which the new one holds.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fastgrpo.checkpoints.changes import Change, changes
from fastgrpo.distributed.launch import is_restarted, mark_launch
from fastgrpo.distributed.world import World
from fastgrpo.files.run_directory import RunDirectory
from fastgrpo.files.whole import write_whole
from fastgrpo.models.adapter import FlowModel, started
from fastgrpo.rewards.self_test import GoldenScores, compare
from fastgrpo.settings import Runtime

_PLANNED = ("micro_batch", "sampling_batch", "decode_batch")
_HISTORY = "history"


@dataclass(kw_only=True)
class SameRun:
    """The run that a config describes, in its directory: a new one, or one that goes on.

    All ranks make one and call its methods together.  Nothing is written before ``claim``.
    """

    directory: RunDirectory
    config: dict[str, Any]
    world: World
    is_resumed: bool
    _begun: dict[str, Any] = field(default_factory=dict)
    _history: list[dict[str, Any]] = field(default_factory=list)
    _changes: tuple[Change, ...] = ()

    @classmethod
    def find(cls, path: Path, config: Mapping[str, Any], *, resume: bool, world: World) -> "SameRun":
        """ValueError for a directory that is taken by a run which is not to go on, or which began otherwise.

        A job that is started again goes on by itself.
        """
        directory = RunDirectory(path)
        is_resumed = resume or is_restarted(path, world)
        run = cls(directory=directory, config=dict(config), world=world, is_resumed=is_resumed)
        if not is_resumed:
            world.on_first(directory.refuse_if_taken, "the run directory")
        elif begun := world.on_first(lambda: _read(directory.config), "the config of the run"):
            run._history = begun.pop(_HISTORY, [])
            run._begun = begun
            _plan_as_begun(run.config, begun)
            _start_as_begun(run.config, begun)
            run._changes = changes(begun, run.config, path)
        elif resume and world.is_first:
            print(f"there is no run in {path} to go on with: this is a new one", flush=True)
        return run

    @property
    def is_begun(self) -> bool:
        """Whether its directory has a config, which says how it began."""
        return bool(self._begun)

    def sizes(self, runtime: Runtime) -> Runtime:
        """Those that a resumed run began with where it is to plan them: others would round differently."""
        return replace(runtime, **{key: self.config["runtime"][key] for key in (*_PLANNED, "checkpointing")})

    def agree(self, runtime: Runtime, model: FlowModel) -> Runtime:
        """Sizes that each rank planned become the least of any; ValueError where ranks differ in anything else."""
        world = self.world
        least: dict[str, Any] = {
            key: min(world.everyones(int(getattr(runtime, key)), f"runtime.{key}")) for key in _PLANNED
        }
        checkpointing = any(world.everyones(bool(runtime.checkpointing), "runtime.checkpointing"))
        agreed = replace(runtime, checkpointing=checkpointing, **least)
        self.config["runtime"] = asdict(agreed)
        start = started(model)
        # what a LoRA's file has decided, so that the run goes on without it
        self.config["adaptation"] = {**self.config["adaptation"], **start.settings}
        identity = {
            "config": _yaml(self.config),
            "weights": model.fingerprint,
            "start": start.digest,
            "version": version("fastgrpo"),
        }
        for rank, other in enumerate(world.everyones(identity, "what is run")):
            for name, value in other.items():
                if value != identity[name]:
                    raise ValueError(f"rank {rank} has another {name} than rank {world.rank}; give all ranks the same")
        return agreed

    def claim(self, golden_scores: dict[str, GoldenScores]) -> None:
        """Make the directory and hold it; keep config and golden scores of a run that begins there."""
        path = self.directory.path

        def make() -> None:
            self.directory = RunDirectory.create(path, resume=self.is_resumed)

        self.world.on_first(make, "the run directory")
        mark_launch(path, self.world)
        self.world.on_first(
            lambda: _hold_to_beginning(RunDirectory(path), golden_scores, self.is_resumed), "golden scores"
        )
        if self.world.is_first and not self._begun:
            write_whole(self.directory.config, _yaml(self.config).encode())

    def resumed(self, iteration: int) -> list[str]:
        """Write down what holds from now on, on the first rank; what to tell the user."""
        if not self._changes:
            return []
        changed = {change.key: [change.before, change.after] for change in self._changes}
        history = [*self._history, {"after_iteration": iteration, "changed": changed}]
        # that this process resumed says nothing of the run
        config = {**self.config, "resume": self._begun["resume"], _HISTORY: history}
        write_whole(self.directory.config, _yaml(config).encode())
        return [f"from iteration {iteration + 1} on: {change}" for change in self._changes]


def _read(path: Path) -> dict[str, Any]:
    begun: Any = OmegaConf.to_container(OmegaConf.load(path)) if path.exists() else {}
    return begun


def _yaml(config: dict[str, Any]) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(config))


def _plan_as_begun(config: dict[str, Any], begun: Mapping[str, Any]) -> None:
    if config["runtime"]["micro_batch"] == 0:
        config["runtime"] = config["runtime"] | {key: begun["runtime"][key] for key in (*_PLANNED, "checkpointing")}


def _start_as_begun(config: dict[str, Any], begun: Mapping[str, Any]) -> None:
    """Where both start from the same LoRA, its rank and layers are not what the line or a default says."""
    before, after = begun.get("adaptation", {}), config["adaptation"]
    if after.get("start") is None or after["start"] != before.get("start"):
        return
    # another scale would be another run
    keys = ["rank", "targets"]
    if math.isclose(after["alpha"] / after["rank"], before["alpha"] / before["rank"]):
        keys.append("alpha")
    config["adaptation"] = after | {key: before[key] for key in keys}


def _hold_to_beginning(directory: RunDirectory, tested: dict[str, GoldenScores], resume: bool) -> None:
    """Keep the golden scores that a run begins with; a resumed run must score as it began."""
    if resume and directory.golden.exists():
        begun = json.loads(directory.golden.read_text(encoding="utf-8"))
        for name in tested.keys() & begun.keys():
            compare(name, tested[name], begun[name], f"{directory.golden}, written when the run began,")
    else:
        text = json.dumps({name: golden.scores for name, golden in tested.items()}, indent=2)
        write_whole(directory.golden, text.encode())
