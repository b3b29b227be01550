"""The metadata of a row is with its images wherever a run asks for rewards: rows of one text that ask for their own.

The reward is 10 * row + brightness, so that each number tells of which row it is.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgrpo.algorithm.image_search import BestOfEstimates, Halving
from fastgrpo.algorithm.making import Search
from fastgrpo.assembly import build_trainer
from fastgrpo.config import load_config
from fastgrpo.distributed.spread import Spread
from fastgrpo.prompt_images import search_images
from fastgrpo.retry import Made
from fastgrpo.rewards.weighted_sum import Rewards
from fastgrpo.trainer import Trainer
from fastgrpo.types import Prompt, Samples, as_prompts
from tests.field import Field
from tests.tiny_config import make_overrides

NUM_ROWS = 5
ROWS = [Prompt("a red circle", metadata={"row": row}) for row in range(NUM_ROWS)]
REWARD = ("reward=custom", "reward.path=tests.test_metadata.coded")


def coded(images_BCHW: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    return 10.0 * torch.tensor([float(row["row"]) for row in metadata]) + images_BCHW.mean(dim=(1, 2, 3))


def make_trainer(weights: Path, directory: Path, *words: str) -> Trainer:
    path = directory / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt.text, **prompt.metadata}) + "\n" for prompt in ROWS))
    words = (f"prompts.path={path}", f"prompts.held_out={path}", *REWARD, *words)
    return build_trainer(load_config("train", make_overrides(weights, directory / "run", *words)))


def rows_of(scores: Tensor) -> list[Any]:
    found: list[Any] = scores.div(10, rounding_mode="floor").int().tolist()
    return found


def rows_at(trainer: Trainer, iteration: int) -> list[list[int]]:
    """Of each group, once a sample."""
    return [[prompt.metadata["row"]] * 3 for prompt in as_prompts(trainer.prompts.at(iteration).asked)]


def test_in_training_and_in_its_evaluation(tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tiny_weights, tmp_path, "evaluate.images_per_prompt=2")
    seen: list[Any] = []
    of_groups = Rewards.of_groups

    def overhear(self: Rewards, rewards_BR: Tensor, group_size: int) -> Any:
        rewards = of_groups(self, rewards_BR, group_size)
        seen.append(rows_of(rewards.named["custom"]))
        return rewards

    monkeypatch.setattr(Rewards, "of_groups", overhear)
    trainer.step()
    trainer.step()
    assert seen == [rows_at(trainer, 0), rows_at(trainer, 1)]
    assert len({row for groups in seen for group in groups for row in group}) > 2
    assert rows_of(trainer.evaluation().scores["custom"]) == [[row] * 2 for row in range(NUM_ROWS)]


def test_in_a_search_of_start_noises(tiny_weights: Path, tmp_path: Path) -> None:
    words = ["algorithm/noise=elite", "algorithm.noise.candidates=4", "algorithm.noise.elites=2"]
    words += ["algorithm.noise.mix=0.5", "train.prompts_per_iteration=4", "algorithm.noise.estimate_steps=1"]
    trainer = make_trainer(tiny_weights, tmp_path, *words)
    noise = trainer.start_noise(Samples.all_of(trainer.prompts.at(0), 3), 0)
    assert noise.estimates_PG is not None
    is_searched_P = ~noise.estimates_PG.isnan().any(dim=1)
    # so that places among the searched are not those among all
    assert 0 < is_searched_P.sum() < 4
    searched = is_searched_P.nonzero().flatten().tolist()
    assert rows_of(noise.estimates_PG[is_searched_P]) == [rows_at(trainer, 0)[p] for p in searched]


def test_in_a_search_of_a_step(tiny_weights: Path, tmp_path: Path) -> None:
    words = ["algorithm/noise=elite_step", "algorithm.noise.take=elites", "algorithm.noise.correction=none"]
    # both groups in one batch
    words += ["algorithm.noise.candidates=4", "algorithm.noise.estimate_steps=1", "runtime.micro_batch=6"]
    trainer = make_trainer(tiny_weights, tmp_path, *words)
    samples = Samples.all_of(trainer.prompts.at(0), 3)
    trajectories = trainer.rollout(samples, trainer.model.encode(samples.texts), trainer.start_noise(samples), 0)
    assert trajectories.chosen is not None
    assert trajectories.chosen.estimates_PG is not None
    assert rows_of(trajectories.chosen.estimates_PG) == rows_at(trainer, 0)


def test_in_groups_that_are_made_again(tiny_weights: Path, tmp_path: Path) -> None:
    words = ("algorithm=nft", "algorithm/noise=retries", "algorithm.noise.where=below", "algorithm.noise.success=1000")
    trainer = make_trainer(tiny_weights, tmp_path, *words, "algorithm.noise.tries=1")
    samples = Samples.all_of(trainer.prompts.at(0), 3)
    # the first group has succeeded; anything is better than what was made of the second
    first = torch.tensor([[2000.0]] * 3 + [[-1.0]] * 3)
    conditions, noise = trainer.model.encode(samples.texts), trainer.start_noise(samples)
    made = Made(trainer.rollout(samples, conditions, noise, 0), first)
    made = trainer.retry(samples, Spread.evenly(len(samples), 1), 0, made)
    assert rows_of(made.rewards_BR.view(2, 3)) == [[200] * 3, rows_at(trainer, 0)[1]]


@pytest.mark.parametrize("search", [BestOfEstimates(estimate_steps=2), Halving(looks=(0.5,), keep=0.5)])
def test_in_a_search_at_sampling(search: Search, tiny_weights: Path, tmp_path: Path) -> None:
    rewards = Rewards(terms={"coded": coded}, weights={"coded": 1.0})
    algorithm = make_trainer(tiny_weights, tmp_path).algorithm
    found = search_images(
        Field(),  # type: ignore[arg-type]
        ROWS,
        rewards,
        algorithm=algorithm,
        search=search,
        budget=20,
        num_steps=4,
        images_per_prompt=2,
    )
    assert rows_of(found.scores_PG) == [[row] * 2 for row in range(NUM_ROWS)]
