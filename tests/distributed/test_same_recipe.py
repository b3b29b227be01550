"""One recipe on 1, 2 and 4 ranks: the same prompts, noise, rewards, steps and weights, but for the order of sums."""

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor

from benchmarks.rounding import Run, beyond_rounding, differences
from fastgrpo.distributed.world import World
from fastgrpo.rewards.scores import Scores
from fastgrpo.rewards.weighted_sum import Rewards
from fastgrpo.types import Samples, TrainedSteps, Trajectories
from tests.distributed import faults
from tests.distributed.training import FLOAT64, make_config, make_trainer, train
from tests.ranks import Ranks, ranks_of_module

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
IMAGES = (
    "algorithm=nft",
    "algorithm.objective.kl_coef=0.1",
    "algorithm.timesteps.per_image=2",
    "algorithm.schedule.num_steps=3",
    "train.updates=3",
)
# pairs that a group shares whichever ranks make its samples, shares of the samples, and rollouts of another policy
SHARED_IMAGES = (
    "algorithm=v_grpo",
    "algorithm.schedule.num_steps=3",
    "train.updates=2",
    "train.optimizer_steps=2",
    "train.old_policy_growth=0.3",
)
# about what the best image of a group has, so that some groups of an iteration are made again and some are not
RETRIED = (
    "algorithm/noise=retries",
    "algorithm.noise.where=below",
    "algorithm.noise.tries=2",
    "algorithm.noise.success=0.125",
)
RETRIED_IMAGES = ("algorithm=nft", "algorithm.schedule.num_steps=3", *RETRIED, "train.optimizer_steps=2")
RETRIED_STEPS = (*RETRIED, "algorithm.noise.candidates=2", "algorithm.noise.estimate_steps=1")
GUIDED = ("model.guidance_scale=2.0", "train.optimizer_steps=2")
FULL = ("adaptation=full", "train.learning_rate=1e-4", "train.prompts_per_iteration=4", "train.group_size=2")
# of 4 prompts it searches few, so that some rank has no candidate, and must keep step
RARE_SEARCH = (*SEARCH, "algorithm.noise.candidates=2", "algorithm.noise.elites=2", "algorithm.noise.mix=0.6")

Fault = Callable[[World], AbstractContextManager[None]]

on_ranks = ranks_of_module()


def beyond(alone: Run, found: Sequence[Run], dtype: str = "float64") -> dict[str, float]:
    """What differs by more than rounding from the run on one rank; weights must be equal to the bit on all others."""
    for run in found[1:]:
        assert all(torch.equal(weight, found[0].ended[name]) for name, weight in run.ended.items())
    return beyond_rounding(differences(alone, found[0]), dtype)


@pytest.mark.parametrize(
    ("recipe", "num_ranks"),
    [
        # 15 samples in shares of 8 and 7, or of 5, 5 and 5
        pytest.param(SEARCH, 4, id="search"),
        pytest.param(REWEIGHT, 2, id="reweight"),
        pytest.param(SHARED, 2, id="shared"),
        pytest.param(GUIDED, 2, id="guided"),
        pytest.param(IMAGES, 2, id="images"),
        pytest.param(SHARED_IMAGES, 4, id="shared images"),
        pytest.param(RETRIED_IMAGES, 4, id="retried images"),
        pytest.param(RETRIED_STEPS, 2, id="retried steps"),
    ],
)
def test_metrics_and_weights_are_those_of_one_rank(
    recipe: tuple[str, ...], num_ranks: int, tiny_weights: Path, tmp_path: Path, on_ranks: Ranks
) -> None:
    config = make_config(tiny_weights, *FLOAT64, *recipe)
    alone = train(World(), config, tmp_path / "1")
    found = on_ranks(num_ranks, train, config, tmp_path / "ranks")
    assert beyond(alone, found) == {}
    assert [row.get("ratio_deviation", 0.0) for row in found[0].rows[1:]] == [0.0] * 2


@pytest.mark.parametrize(("rollout_weights", "num_ranks"), [("gathered", 2), ("sharded", 3)])
def test_full_fine_tuning_on_shards_is_that_of_one_rank(
    rollout_weights: str, num_ranks: int, tiny_weights: Path, tmp_path: Path, on_ranks: Ranks
) -> None:
    words = (*FLOAT64, *RARE_SEARCH, *FULL, f"adaptation.rollout_weights={rollout_weights}")
    config = make_config(tiny_weights, *words)
    alone = train(World(), config, tmp_path / "1")
    assert beyond(alone, on_ranks(num_ranks, train, config, tmp_path / "ranks")) == {}
    num_candidates = [4 * 2 * row["search/share"] for row in alone.rows[1:]]
    assert 0 < min(num_candidates) < 3


def test_ranks_without_samples_that_are_made_again_keep_step(
    tiny_weights: Path, tmp_path: Path, on_ranks: Ranks
) -> None:
    words = (*FLOAT64, *RETRIED_STEPS, *FULL, "adaptation.rollout_weights=sharded", "algorithm.noise.success=0.121")
    config = make_config(tiny_weights, *words)
    alone = train(World(), config, tmp_path / "1")
    assert beyond(alone, on_ranks(3, train, config, tmp_path / "ranks")) == {}
    # groups of 2 samples on 3 ranks
    assert min(row["search/share"] for row in alone.rows[1:]) == 0.25


@pytest.mark.parametrize(
    ("rollout_weights", "num_ranks", "setting"),
    [
        ("gathered", 3, "train.old_policy_growth=0.3"),
        ("sharded", 2, "train.old_policy_growth=0.3"),
        # 8 samples, of which one rank has 2 and keeps step with an empty batch, velocities compared
        ("sharded", 3, "runtime.micro_batch=1"),
    ],
)
def test_full_fine_tuning_on_images_is_that_of_one_rank(
    rollout_weights: str, num_ranks: int, setting: str, tiny_weights: Path, tmp_path: Path, on_ranks: Ranks
) -> None:
    words = (*FLOAT64, *IMAGES, *FULL, f"adaptation.rollout_weights={rollout_weights}", setting)
    config = make_config(tiny_weights, *words)
    alone = train(World(), config, tmp_path / "1")
    assert beyond(alone, on_ranks(num_ranks, train, config, tmp_path / "ranks")) == {}


@pytest.fixture(scope="module")
def plain(tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[DictConfig, Run]]:
    """Flow-GRPO's recipe in each precision, and what one rank makes of it."""
    output = tmp_path_factory.mktemp("alone")
    configs = {"float64": make_config(tiny_weights, *FLOAT64), "float32": make_config(tiny_weights)}
    return {dtype: (config, train(World(), config, output / dtype)) for dtype, config in configs.items()}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_only_rounding_differs(
    dtype: str, plain: dict[str, tuple[DictConfig, Run]], tmp_path: Path, on_ranks: Ranks
) -> None:
    config, alone = plain[dtype]
    # 8 and 7 samples, in two batches each
    assert beyond(alone, on_ranks(2, train, config, tmp_path / "run"), dtype) == {}


def train_with(world: World, fault: Fault, config: DictConfig, output: Path) -> Run:
    with fault(world):
        return train(world, config, output)


@pytest.mark.parametrize(
    ("dtype", "fault", "shows_in"),
    [
        ("float64", faults.a_lost_gradient, {"weights", "grad_norm", "kl"}),
        ("float64", faults.too_large_a_sum, {"weights", "grad_norm"}),
        ("float64", faults.advantages_of_another, {"weights", "grad_norm", "loss"}),
        ("float64", faults.a_skipped_batch, {"weights", "grad_norm", "kl"}),
        ("float64", faults.rewards_in_another_order, {"weights", "grad_norm", "reward/group_std"}),
        ("float32", faults.a_lost_gradient, {"weights", "grad_norm", "kl"}),
        # Adam steps by the same way, whatever all gradients are multiplied by
        ("float32", faults.too_large_a_sum, {"grad_norm"}),
    ],
)
def test_the_comparison_is_not_blind(
    dtype: str,
    fault: Fault,
    shows_in: set[str],
    plain: dict[str, tuple[DictConfig, Run]],
    tmp_path: Path,
    on_ranks: Ranks,
) -> None:
    config, alone = plain[dtype]
    found = on_ranks(2, train_with, fault, config, tmp_path / "run")
    assert beyond(alone, found, dtype).keys() >= shows_in


def roll(world: World, config: DictConfig, output: Path) -> tuple[list[str], list[int], list[list[float]]]:
    """Texts, ids and a few numbers of start noise, latents and images of this rank's samples."""
    trainer = make_trainer(world, config, output)
    seen: list[tuple[Samples, Trajectories[TrainedSteps]]] = []
    rollout = trainer.rollout

    def keeping(samples: Samples, *arguments: Any, **settings: Any) -> Trajectories[TrainedSteps]:
        seen.append((samples, rollout(samples, *arguments, **settings)))
        return seen[-1][1]

    trainer.rollout = keeping  # type: ignore[assignment]
    trainer.step()
    ((samples, trajectories),) = seen
    stored = (trajectories.start_BCHW, trajectories.images_BCHW, trajectories.trained.x_next_TBCHW.transpose(0, 1))
    parts = [tensor.flatten(1)[:, ::97].double() for tensor in stored]
    return samples.texts, list(samples.rows), torch.cat(parts, dim=1).tolist()


def test_each_sample_is_made_once_from_the_same_noise(tiny_weights: Path, tmp_path: Path, on_ranks: Ranks) -> None:
    config = make_config(tiny_weights, *FLOAT64, *SEARCH)
    alone = roll(World(), config, tmp_path / "1")
    expected = {row: (text, numbers) for text, row, numbers in zip(*alone, strict=True)}
    assert sorted(expected) == list(range(15))
    made = on_ranks(4, roll, config, tmp_path / "4")
    found = [sample for rank in made for sample in zip(*rank, strict=True)]
    assert sorted(row for _, row, _ in found) == list(range(15))
    for text, row, numbers in found:
        assert text == expected[row][0]
        assert numbers == pytest.approx(expected[row][1], rel=1e-9, abs=1e-9)
    assert sorted(len(rank[0]) for rank in made) == [3, 4, 4, 4]


def too_few(world: World, config: DictConfig, output: Path) -> str:
    with pytest.raises(ValueError, match="less than one in each step for each of 2 ranks") as raised:
        make_trainer(world, config, output)
    return str(raised.value)


def test_fewer_samples_than_ranks_are_refused(tiny_weights: Path, tmp_path: Path, on_ranks: Ranks) -> None:
    config = make_config(tiny_weights, "train.prompts_per_iteration=1", "train.group_size=2", "train.optimizer_steps=2")
    assert len(set(on_ranks(2, too_few, config, tmp_path / "run"))) == 1


def stop(world: World, config: DictConfig, output: Path) -> str:
    """The second rank alone is asked to stop, in the first iteration."""
    trainer = make_trainer(world, config, output)
    trainer._stop_request.number = 10 * world.rank
    with pytest.raises(RuntimeError, match="stopped by signal 10 after iteration 1, which is saved") as raised:
        trainer.run()
    return type(raised.value).__name__


def test_a_signal_to_one_rank_stops_all_after_the_same_iteration(
    tiny_weights: Path, tmp_path: Path, on_ranks: Ranks
) -> None:
    assert on_ranks(2, stop, make_config(tiny_weights), tmp_path / "run") == ["Preempted"] * 2
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_000001"]


def fail(world: World, config: DictConfig, output: Path) -> list[str]:
    """The reward of the second rank fails in the second iteration; both save the first and stop."""
    trainer = make_trainer(world, config, output)
    begin = Rewards.begin

    def failing(rewards: Rewards, texts: list[str]) -> Scores[Tensor]:
        return begin(rewards, [*texts, "one too many"] if world.rank == 1 and trainer.iteration == 1 else texts)

    with (
        mock.patch.object(Rewards, "begin", failing),
        pytest.raises(ValueError, match="iteration 1 is saved") as raised,
    ):
        trainer.run()
    return [type(raised.value).__name__, str(raised.value)]


def test_where_one_ranks_reward_fails_all_save_and_stop(tiny_weights: Path, tmp_path: Path, on_ranks: Ranks) -> None:
    first, second = on_ranks(2, fail, make_config(tiny_weights), tmp_path / "run")
    assert first == second
    assert first[0] == "RewardError"
    assert re.match(r"rank 1 on \S+: ValueError: 7 images but 8 prompts", first[1]), first[1]
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_000001"]


def run_in_legs(on_ranks: Ranks, config: DictConfig, output: Path, worlds: Sequence[int]) -> Run:
    """One iteration on each number of ranks in turn, each going on from the checkpoint of the one before."""
    legs = [
        on_ranks(num_ranks, train, config, output, iterations=end, resume=end > 1)[0]
        for end, num_ranks in enumerate(worlds, start=1)
    ]
    return Run([row for leg in legs for row in leg.rows], legs[0].began, legs[-1].ended)


@pytest.mark.parametrize("worlds", [(2, 1), pytest.param((4, 1, 2, 4), marks=pytest.mark.slow)], ids=str)
def test_a_run_goes_on_with_another_number_of_ranks(
    worlds: tuple[int, ...], tiny_weights: Path, tmp_path: Path, on_ranks: Ranks
) -> None:
    config = make_config(tiny_weights, *FLOAT64, "evaluate.every=1")
    alone = train(World(), config, tmp_path / "alone", iterations=len(worlds))
    moved = run_in_legs(on_ranks, config, tmp_path / "moved", worlds)
    assert beyond(alone, [moved]) == {}
