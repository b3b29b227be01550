"""One recipe on 1, 2 and 4 ranks: the same prompts, noise, rewards and steps; metrics differ by the order of sums."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.same_recipe import largest_difference
from fastgrpo.config import load_config
from fastgrpo.distributed.world import World
from fastgrpo.rewards.ranks import PolicyRank
from fastgrpo.train import build_trainer
from fastgrpo.trainer import Trainer
from fastgrpo.types import Samples, Trajectories
from tests.ranks import on_ranks
from tests.tiny_config import make_overrides

FLOAT64 = ("model.dtype=float64", "model.decode_dtype=float64")
# 3 x 5 samples divide by neither 2 nor 4
SIZES = ("train.prompts_per_iteration=3", "train.group_size=5", "train.learning_rate=1e-3", "train.iterations=3")
SEARCH = (
    "algorithm=smart_grpo",
    "algorithm/timesteps=all_but_last",
    "algorithm.objective.kl_coef=0.04",
    "algorithm.noise.candidates=5",
    "algorithm.noise.elites=3",
    "algorithm.noise.estimate_steps=2",
    "train.optimizer_steps=2",
)
REWEIGHT = ("algorithm.objective.kl_coef=0", "train.gradients=reweight", "train.optimizer_steps=3")
SHARED = ("algorithm/noise=shared", "algorithm/timesteps=random_window", "algorithm.timesteps.high=3")
GUIDED = ("model.guidance_scale=2.0", "train.optimizer_steps=2")
RECIPES: dict[str, tuple[str, ...]] = {
    "flow": (),
    "search": SEARCH,
    "reweight": REWEIGHT,
    "shared": SHARED,
    "guided": GUIDED,
}


def make_trainer(world: World, weights: Path, output: Path, *overrides: str) -> Trainer:
    settings = make_overrides(weights, output, *SIZES, *overrides)
    if "adaptation=full" in settings:
        settings = [value for value in settings if not value.startswith(("adaptation.rank", "adaptation.alpha"))]
    return build_trainer(load_config("train", settings), PolicyRank(world=world))


def train(world: World, weights: Path, output: Path, *overrides: str) -> float:
    """A whole run; returns the sum of the trained weights that this rank holds."""
    trainer = make_trainer(world, weights, output, *overrides)
    trainer.resume()
    trainer.run()
    return sum(weight.detach().double().sum().item() for weight in trainer.model.trainable.values())


def rows_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("recipe", RECIPES)
def test_metrics_are_those_of_one_rank(recipe: str, tiny_weights: Path, tmp_path: Path) -> None:
    train(World(), tiny_weights, tmp_path / "1", *FLOAT64, *RECIPES[recipe])
    for num_ranks in (2, 4):
        output = tmp_path / str(num_ranks)
        sums = on_ranks(num_ranks, train, tiny_weights, output, *FLOAT64, *RECIPES[recipe])
        # replicas to the bit
        assert len(set(sums)) == 1
        key, difference = largest_difference(rows_of(tmp_path / "1"), rows_of(output))
        assert difference < 1e-6, key
        assert [row["ratio_deviation"] for row in rows_of(output)[1:]] == [0.0] * 3


@pytest.mark.parametrize("rollout_weights", ["gathered", "sharded"])
def test_full_fine_tuning_on_shards_is_that_of_one_rank(
    rollout_weights: str, tiny_weights: Path, tmp_path: Path
) -> None:
    # a search has ranks without candidates, and evaluation ranks without images, that must keep step
    settings = (
        *FLOAT64,
        *SEARCH,
        "adaptation=full",
        f"adaptation.rollout_weights={rollout_weights}",
        "algorithm.noise.candidates=1",
        "algorithm.noise.elites=1",
        "algorithm.noise.mix=0.6",
        "train.learning_rate=1e-4",
        "train.prompts_per_iteration=8",
        "train.group_size=1",
    )
    train(World(), tiny_weights, tmp_path / "1", *settings)
    for num_ranks in (2, 4):
        on_ranks(num_ranks, train, tiny_weights, tmp_path / str(num_ranks), *settings)
        key, difference = largest_difference(rows_of(tmp_path / "1"), rows_of(tmp_path / str(num_ranks)))
        assert difference < 1e-6, key


def test_in_float32_only_rounding_differs(tiny_weights: Path, tmp_path: Path) -> None:
    train(World(), tiny_weights, tmp_path / "1", "train.iterations=5")
    on_ranks(4, train, tiny_weights, tmp_path / "4", "train.iterations=5")
    key, difference = largest_difference(rows_of(tmp_path / "1"), rows_of(tmp_path / "4"))
    assert difference < 1e-3, key


def roll(world: World, weights: Path, output: Path) -> tuple[list[str], list[int], list[list[float]]]:
    """Texts, ids and a few numbers of start noise, latents and images of this rank's samples."""
    trainer = make_trainer(world, weights, output, *FLOAT64, *SEARCH)
    seen: list[tuple[Samples, Trajectories]] = []
    rollout = trainer.rollout

    def keeping(samples: Samples, *arguments: Any, **settings: Any) -> Trajectories:
        seen.append((samples, rollout(samples, *arguments, **settings)))
        return seen[-1][1]

    trainer.rollout = keeping  # type: ignore[assignment]
    trainer.step()
    ((samples, trajectories),) = seen
    stored = (trajectories.start_BCHW, trajectories.images_BCHW, trajectories.trained.x_next_TBCHW.transpose(0, 1))
    parts = [tensor.flatten(1)[:, ::97].double() for tensor in stored]
    return samples.texts, list(samples.rows), torch.cat(parts, dim=1).tolist()


def test_each_sample_is_made_once_from_the_same_noise(tiny_weights: Path, tmp_path: Path) -> None:
    alone = roll(World(), tiny_weights, tmp_path / "1")
    expected = {row: (text, numbers) for text, row, numbers in zip(*alone, strict=True)}
    assert sorted(expected) == list(range(15))
    for num_ranks in (2, 4):
        made = on_ranks(num_ranks, roll, tiny_weights, tmp_path / str(num_ranks))
        found = [sample for rank in made for sample in zip(*rank, strict=True)]
        assert sorted(row for _, row, _ in found) == list(range(15))
        for text, row, numbers in found:
            assert text == expected[row][0]
            assert numbers == pytest.approx(expected[row][1], abs=1e-6)
        sizes = [len(rank[0]) for rank in made]
        assert max(sizes) - min(sizes) <= 1


def too_few(world: World, weights: Path, output: Path) -> str:
    with pytest.raises(ValueError, match="less than one in each step for each of 4 ranks") as raised:
        make_trainer(world, weights, output, "train.group_size=1")
    return str(raised.value)


def test_fewer_samples_than_ranks_are_refused(tiny_weights: Path, tmp_path: Path) -> None:
    assert len(set(on_ranks(4, too_few, tiny_weights, tmp_path / "run"))) == 1


def stop(world: World, weights: Path, output: Path) -> str:
    """The second rank alone is asked to stop, in the first iteration."""
    trainer = make_trainer(world, weights, output)
    trainer._stop_request.number = 10 * world.rank
    with pytest.raises(RuntimeError, match="stopped by signal 10 after iteration 1, which is saved") as raised:
        trainer.run()
    return type(raised.value).__name__


def test_a_signal_to_one_rank_stops_all_after_the_same_iteration(tiny_weights: Path, tmp_path: Path) -> None:
    assert on_ranks(2, stop, tiny_weights, tmp_path / "run") == ["Preempted"] * 2
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_000001"]


def resume(world: World, weights: Path, output: Path, iterations: int) -> float:
    settings = (*FLOAT64, f"train.iterations={iterations}", "evaluate.every=1", f"resume={output.exists()}")
    return train(world, weights, output, *settings)


def test_a_run_goes_on_with_another_number_of_ranks(tiny_weights: Path, tmp_path: Path) -> None:
    resume(World(), tiny_weights, tmp_path / "alone", 4)
    for iterations, num_ranks in enumerate((4, 1, 2, 4), start=1):
        on_ranks(num_ranks, resume, tiny_weights, tmp_path / "moved", iterations)
    key, difference = largest_difference(rows_of(tmp_path / "alone"), rows_of(tmp_path / "moved"))
    assert difference < 1e-6, key


def fail(world: World, weights: Path, output: Path) -> list[str]:
    """The reward of the second rank fails in the second iteration; both save the first and stop."""
    trainer = make_trainer(world, weights, output, "reward.scoring.retries=0")
    begin = type(trainer.rewards).begin

    def failing(rewards: Any, texts: list[str]) -> Any:
        scores = begin(rewards, texts)
        if world.rank == 1 and trainer.iteration == 1:
            scores._texts.append("one too many")
        return scores

    # the process ends with the test
    type(trainer.rewards).begin = failing  # type: ignore[assignment, method-assign]
    with pytest.raises(ValueError, match="iteration 1 is saved") as raised:
        trainer.run()
    return [type(raised.value).__name__, str(raised.value)]


def test_where_one_ranks_reward_fails_all_save_and_stop(tiny_weights: Path, tmp_path: Path) -> None:
    first, second = on_ranks(2, fail, tiny_weights, tmp_path / "run")
    assert first == second
    assert first[0] == "RewardError"
    assert re.match(r"rank 1 on \S+: ValueError: 7 images but 8 texts", first[1]), first[1]
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_000001"]
