"""One cell of the comparison: a policy, a way to spend network evaluations, a budget; and what its images are worth.

Each is a .json file of its own, so that what was interrupted goes on.  Letters: P prompts, G images of each.
"""

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from fastgrpo.algorithm.algorithm import Algorithm
from fastgrpo.algorithm.image_search import BestOfEstimates, BestOfN, Elite, Halving
from fastgrpo.algorithm.making import Search
from fastgrpo.assembly import build_evaluation
from fastgrpo.commands.trained import load_model, with_run
from fastgrpo.config import load_config
from fastgrpo.evaluation import Evaluation
from fastgrpo.image_search import ImageSearch
from fastgrpo.parts import build_rewards, read_prompts, read_runtime
from fastgrpo.pieces import build
from fastgrpo.sampler import Sampler
from fastgrpo.settings import Evaluating

NUM_STEPS = 10
# of what is searched by CLIP: enough to see where it leads
_HACKED = (20, 80, 160)
SEARCHES: dict[str, Search] = {
    "best of N": BestOfN(),
    "best of estimates": BestOfEstimates(),
    "elite search": Elite(),
    "halving": Halving(),
}
# a search of guided images, whose velocities take two evaluations
GUIDED = "halving, guidance 2.5"
_GUIDED_BUDGETS = (40, 80, 160)
# of the embedded world: what is searched for, and what judges without having been asked
_REWARDS = {
    "verifier": ("reward=shapes", "+reward/terms@reward.watch.clip_score=clip_shapes"),
    "CLIP": (
        "reward=clip_score",
        "reward.terms.clip_score.path=shapes",
        "+reward/terms@reward.watch.shapes=shapes",
        "+reward/terms@reward.watch.shapes_strict=shapes_strict",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """``method`` of ``policy``, base or trained; a search by ``searched``, of ``budget`` evaluations an image."""

    policy: str
    method: str
    budget: int
    searched: str = "verifier"
    guidance_scale: float = 1.0
    num_steps: int = NUM_STEPS

    @property
    def name(self) -> str:
        """Of its file."""
        words = f"{self.policy} {self.method} {self.budget} by {self.searched}"
        return words.lower().replace(" ", "_").replace(".", "p")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Rewards [P, G] by name, and what they took: evaluations and scored images an image, CPU seconds in all."""

    cell: Cell
    scores: dict[str, list[list[float]]]
    evaluations: float
    scored: float
    cpu_seconds: float

    def mean(self, reward: str) -> float:
        return statistics.fmean(self._means(reward))

    def error(self, reward: str) -> float:
        """Standard error over prompts: images of one are not independent."""
        means_P = self._means(reward)
        return statistics.stdev(means_P) / math.sqrt(len(means_P)) if len(means_P) > 1 else math.nan

    def _means(self, reward: str) -> list[float]:
        return [statistics.fmean(scores_G) for scores_G in self.scores[reward]]


def plain_cells(policy: str) -> list[Cell]:
    """Without a search: plain noise, more steps, and guidance, which takes two evaluations a step."""
    more_steps = [
        Cell(policy=policy, method="more steps", budget=num_steps, num_steps=num_steps) for num_steps in (20, 40, 80)
    ]
    guided = [
        Cell(
            policy=policy,
            method=f"guidance {scale:g}",
            budget=2 * num_steps,
            guidance_scale=scale,
            num_steps=num_steps,
        )
        for num_steps in (10, 20)
        for scale in (1.5, 2.5, 4.0)
    ]
    return [Cell(policy=policy, method="plain noise", budget=NUM_STEPS), *more_steps, *guided]


def searched_cells(policy: str, budgets: Sequence[int], methods: Sequence[str], searched: str) -> list[Cell]:
    """The searches at budgets that buy more than plain noise, at some of them by CLIP."""
    return [
        Cell(policy=policy, method=method, budget=budget, searched=searched)
        for budget in budgets
        if budget > NUM_STEPS and (searched == "verifier" or budget in _HACKED)
        for method in methods
    ]


def guided_cells(policy: str) -> list[Cell]:
    """A search of guided images."""
    return [Cell(policy=policy, method=GUIDED, budget=budget, guidance_scale=2.5) for budget in _GUIDED_BUDGETS]


def search_of(method: str) -> Search | None:
    """None where nothing is searched."""
    return SEARCHES.get(method.removesuffix(", guidance 2.5"))


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measures cells; what was measured before is read from ``directory``."""

    directory: Path
    run: str
    images_per_prompt: int
    overrides: tuple[str, ...] = ()

    def __call__(self, cell: Cell) -> Measured:
        path = self.directory / f"{cell.name}.json"
        if path.is_file():
            return self._read(path, cell)
        evaluation = _evaluation(self, cell.policy, cell.searched, cell.guidance_scale, cell.num_steps)
        search = search_of(cell.method)
        if search is not None:
            evaluation = replace(evaluation, search=self._search(evaluation, search, cell))
        start = time.process_time()
        result = evaluation()
        measured = Measured(
            cell=cell,
            scores={name: scores_PG.tolist() for name, scores_PG in result.scores.items()},
            evaluations=result.cost.evaluations / result.num_images,
            scored=result.cost.scored / result.num_images,
            cpu_seconds=time.process_time() - start,
        )
        self.directory.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(measured) | {"settings": self._settings(search)}) + "\n")
        return measured

    def measured(self, cell: Cell) -> Measured | None:
        """What is there already."""
        path = self.directory / f"{cell.name}.json"
        return self._read(path, cell) if path.is_file() else None

    def _read(self, path: Path, cell: Cell) -> Measured:
        found: dict[str, Any] = json.loads(path.read_text())
        settings = self._settings(search_of(cell.method))
        if (found.pop("settings"), found.pop("cell")) != (json.loads(json.dumps(settings)), asdict(cell)):
            raise ValueError(f"{path} was measured with other settings; give another --out, or remove the file")
        return Measured(cell=cell, **found)

    def _settings(self, search: Search | None) -> dict[str, Any]:
        settings: Any = search
        return {
            "run": self.run,
            "images_per_prompt": self.images_per_prompt,
            "overrides": list(self.overrides),
            "search": asdict(settings) if search is not None else None,
        }

    def _search(self, evaluation: Evaluation, search: Search, cell: Cell) -> ImageSearch:
        return ImageSearch(
            sampler=Sampler(model=evaluation.model, grid=evaluation.grid, batch_sizes=evaluation.batch_sizes),
            rewards=evaluation.rewards,
            search=search,
            budget=cell.budget,
            estimate_grid=_parts(self, cell.policy, cell.searched, cell.guidance_scale)[1].estimate_grid,
        )


def _evaluation(bench: Bench, policy: str, searched: str, guidance_scale: float, num_steps: int) -> Evaluation:
    make, _ = _parts(bench, policy, searched, guidance_scale)
    return make(num_steps)


# a model is loaded once
@cache
def _parts(
    bench: Bench, policy: str, searched: str, guidance_scale: float
) -> tuple[Callable[[int], Evaluation], Algorithm]:
    """Evaluations in so many steps, and the algorithm with its grids."""
    line = [*_REWARDS[searched], "reward.golden=false", "reward_backend=eager", *bench.overrides]
    if policy == "trained":
        line.append(f"run={bench.run}")
    config = with_run(load_config("evaluate", line), line)
    config.model.guidance_scale = guidance_scale
    algorithm: Algorithm = build(config.algorithm)
    prompts = read_prompts(config, "held_out")
    rewards, _ = build_rewards(config)
    model, _ = load_model(config)
    runtime = read_runtime(config)

    def make(num_steps: int) -> Evaluation:
        evaluating = Evaluating(images_per_prompt=bench.images_per_prompt, num_steps=num_steps)
        return build_evaluation(evaluating, runtime, model, rewards, algorithm, prompts)

    return make, algorithm
