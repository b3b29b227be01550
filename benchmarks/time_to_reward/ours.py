"""Ours: ``Trainer.step`` of the trainer that ``fastgrpo train`` builds, with nothing taken out."""

from dataclasses import dataclass
from importlib.resources import files

from benchmarks.time_to_reward.learner import Run, evaluation_of, our_trainer
from fastgrpo.evaluation import EvaluationResult


@dataclass(frozen=True, kw_only=True)
class Ours:
    """A recipe, with overrides of its own."""

    recipe: str
    overrides: tuple[str, ...] = ()

    def missing(self, run: Run) -> str:
        there = files("fastgrpo_configs").joinpath(f"algorithm/{self.recipe}.yaml").is_file()
        return "" if there else f"a recipe algorithm={self.recipe}, which this version has not"

    def __call__(self, run: Run) -> "OurLearner":
        return OurLearner(run, (f"algorithm={self.recipe}", *self.overrides))


class OurLearner:
    """``Learner`` over a trainer."""

    def __init__(self, run: Run, overrides: tuple[str, ...]) -> None:
        self.trainer = our_trainer(run, overrides)
        self._evaluation = evaluation_of(self.trainer)

    def step(self) -> float:
        return self.trainer.step()["reward/total"]

    def evaluate(self) -> EvaluationResult:
        with self.trainer.ema.applied():
            return self._evaluation()
