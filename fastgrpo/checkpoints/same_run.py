"""One run on all its ranks and after each resumption: one directory, one config, the same weights and rewards."""

import json
from importlib.metadata import version
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from fastgrpo.distributed.launch import is_restarted, mark_launch
from fastgrpo.distributed.world import World
from fastgrpo.files.run_directory import RunDirectory
from fastgrpo.files.whole import write_whole
from fastgrpo.models.adapter import FlowModel
from fastgrpo.rewards.self_test import GoldenScores, compare

_PLANNED = ("micro_batch", "sampling_batch", "decode_batch")


def open_directory(config: DictConfig, golden_scores: dict[str, GoldenScores], world: World) -> RunDirectory:
    """The run directory, which the first rank makes and holds.  A job that is started again goes on by itself."""
    path = Path(config.output)
    config.resume = config.resume or is_restarted(path, world)
    held: list[RunDirectory] = []

    def make() -> None:
        held.append(RunDirectory.create(path, resume=config.resume))

    world.on_first(make, "the run directory")
    mark_launch(path, world)
    world.on_first(lambda: _hold_to_beginning(RunDirectory(path), golden_scores, config.resume), "golden scores")
    _cut_as_begun(config, RunDirectory(path))
    return held[0] if held else RunDirectory(path)


def agree(config: DictConfig, model: FlowModel, world: World) -> None:
    """Sizes that each rank planned become the least of any; ValueError where ranks differ in anything else."""
    for key in _PLANNED:
        config.runtime[key] = min(world.everyones(int(config.runtime[key]), f"runtime.{key}"))
    config.runtime.checkpointing = any(world.everyones(bool(config.runtime.checkpointing), "runtime.checkpointing"))
    identity = {"config": OmegaConf.to_yaml(config), "weights": model.fingerprint, "version": version("fastgrpo")}
    for rank, other in enumerate(world.everyones(identity, "what is run")):
        for name, value in other.items():
            if value != identity[name]:
                raise ValueError(f"rank {rank} has another {name} than rank {world.rank}; give all ranks the same")


def _hold_to_beginning(directory: RunDirectory, tested: dict[str, GoldenScores], resume: bool) -> None:
    """Keep the golden scores that a run begins with; a resumed run must score as it began."""
    if resume and directory.golden.exists():
        begun = json.loads(directory.golden.read_text(encoding="utf-8"))
        for name in tested.keys() & begun.keys():
            compare(name, tested[name], begun[name], f"{directory.golden}, written when the run began,")
    else:
        text = json.dumps({name: golden.scores for name, golden in tested.items()}, indent=2)
        write_whole(directory.golden, text.encode())


def _cut_as_begun(config: DictConfig, directory: RunDirectory) -> None:
    """Sizes of a resumed run that are to be planned are those that it began with: others would round differently."""
    if config.resume and config.runtime.micro_batch == 0 and directory.config.exists():
        begun = OmegaConf.load(directory.config).runtime
        for key in (*_PLANNED, "checkpointing"):
            config.runtime[key] = begun[key]
