"""A whole training run on a rank, kept in memory: the real trainer, without curves and pictures, which take longer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.distributed.tensor import DTensor

from benchmarks.rounding import Run
from fastgrpo.assembly import build_trainer
from fastgrpo.config import load_config
from fastgrpo.distributed.world import World
from fastgrpo.records.record import NoRecord
from fastgrpo.rewards.ranks import PolicyRank
from fastgrpo.trainer import Trainer
from tests.tiny_config import make_overrides

# a reward that follows rounding, where the bytes of a JPEG would jump; 3 x 5 samples divide by neither 2 nor 4
SETTINGS = (
    "reward=custom",
    "reward.path=benchmarks.same_recipe.contrast",
    "train.prompts_per_iteration=3",
    "train.group_size=5",
    "train.learning_rate=1e-3",
)
FLOAT64 = ("model.dtype=float64", "model.decode_dtype=float64")


class Kept(NoRecord):
    """The metrics of a run."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def row(self, iteration: int, values: Mapping[str, float]) -> None:
        self.rows.append({"iteration": iteration, **values})


def make_config(weights: Path, *overrides: str) -> DictConfig:
    """Of a run whose output is still to be said: composing it takes as long as some iterations."""
    words = make_overrides(weights, weights.parent / "nowhere", *SETTINGS, *overrides)
    if "adaptation=full" in words:
        words = [word for word in words if not word.startswith(("adaptation.rank", "adaptation.alpha"))]
    return load_config("train", words)


def make_trainer(world: World, config: DictConfig, output: Path, **settings: Any) -> Trainer:
    """``settings`` are of the config's top level and of ``train``."""
    config = config.copy()
    config.output = str(output)
    for key, value in settings.items():
        node = config if key in config else config.train
        node[key] = value
    trainer = build_trainer(config, PolicyRank(world=world))
    trainer.record = Kept()
    return trainer


def train(world: World, config: DictConfig, output: Path, **settings: Any) -> Run:
    """To the end, from the last checkpoint in ``output`` if it is to be resumed."""
    trainer = make_trainer(world, config, output, **settings)
    began = trained(trainer)
    trainer.resume()
    trainer.run()
    assert isinstance(trainer.record, Kept)
    return Run(rows=trainer.record.rows, began=began, ended=trained(trainer))


def trained(trainer: Trainer) -> dict[str, Tensor]:
    """Copies of whole weights."""
    return {name: whole(weight).to("cpu", copy=True) for name, weight in trainer.model.trainable.items()}


def whole(weight: Tensor) -> Tensor:
    with torch.no_grad():
        return weight.full_tensor() if isinstance(weight, DTensor) else weight.detach()
