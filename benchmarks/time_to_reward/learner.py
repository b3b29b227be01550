"""What all sides are: called, they train for one iteration; and what judges them, the same for all."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fastgrpo.algorithm.schedule import SD3Schedule
from fastgrpo.assembly import build_trainer
from fastgrpo.config import load_config
from fastgrpo.evaluation import Evaluation, EvaluationResult
from fastgrpo.trainer import Trainer

PROMPTS = 12
GROUP = 16
NUM_IMAGES = PROMPTS * GROUP
NUM_STEPS = 10
IMAGES_PER_PROMPT = 8
# no run comes so far; a search that is annealed hardly is
_ITERATIONS = 100_000


@dataclass(frozen=True, kw_only=True)
class Run:
    """What every side is told.  ``flow_grpo`` and ``nft`` are checkouts, where there are any; ``scratch`` is empty."""

    seed: int
    learning_rate: float
    scratch: Path
    flow_grpo: Path | None = None
    nft: Path | None = None


class Learner(Protocol):
    """A side in training."""

    def step(self) -> float:
        """One iteration, ``NUM_IMAGES`` images; their mean graded reward."""

    def evaluate(self) -> EvaluationResult:
        """Of the averaged weights, as ``evaluation_of`` says."""


def our_trainer(run: Run, overrides: tuple[str, ...] = ()) -> Trainer:
    """The trainer of ``fastgrpo train`` on the embedded model; ``overrides`` come last and win."""
    return build_trainer(
        load_config(
            "train",
            [
                f"output={run.scratch / 'run'}",
                f"seed={run.seed}",
                f"runtime.device={device()}",
                "runtime.threads=1",
                f"train.learning_rate={run.learning_rate}",
                f"train.prompts_per_iteration={PROMPTS}",
                f"train.group_size={GROUP}",
                f"train.iterations={_ITERATIONS}",
                f"evaluate.images_per_prompt={IMAGES_PER_PROMPT}",
                *overrides,
            ],
        )
    )


def evaluation_of(trainer: Trainer) -> Evaluation:
    """Its own evaluation, on the grid that all sides are judged on, whatever it samples with."""
    return replace(trainer.evaluation, grid=SD3Schedule(NUM_STEPS)())


class Judge:
    """The evaluation of weights that were trained elsewhere, by their names in our model."""

    def __init__(self, run: Run) -> None:
        self._trainer = our_trainer(run, ("algorithm=flow_grpo",))
        self._evaluation = evaluation_of(self._trainer)

    @property
    def names(self) -> set[str]:
        return set(self._trainer.model.trainable)

    def __call__(self, weights: Mapping[str, Tensor]) -> EvaluationResult:
        with self.loaded(weights):
            return self._evaluation()

    @contextmanager
    def loaded(self, weights: Mapping[str, Tensor]) -> Iterator[Trainer]:
        """Our model with these weights."""
        trained = self._trainer.model.trainable
        if weights.keys() != trained.keys():
            raise ValueError(
                f"adapters of other layers than ours were trained: {sorted(weights.keys() ^ trained.keys())}; "
                "use a checkout whose script trains the joint attention of every block"
            )
        with torch.no_grad():
            for name, weight in trained.items():
                weight.copy_(weights[name])
        yield self._trainer


def our_name(theirs: str) -> str:
    """Of an adapter's weight in peft, its name in our model."""
    return theirs.removeprefix("base_model.model.").replace(".default.", ".")


def halves(num_prompts: int) -> tuple[list[int], list[int]]:
    """Which held-out prompts learning rates are chosen on, and which are reported: of neighbors, alike, one each."""
    coin = random.Random(0)
    tuning = [first + coin.randrange(2) for first in range(0, num_prompts - 1, 2)]
    return tuning, sorted(set(range(num_prompts)) - set(tuning))


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
