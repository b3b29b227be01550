"""Where pieces are handed to each other: each test fails when the trainer hands on the wrong thing.

The keys of a config have unusual values here, so that a default, or another key's value, in their place is seen.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgrpo.algorithm.schedule import SD3Schedule
from fastgrpo.assembly import _planner, assemble, build_trainer
from fastgrpo.checkpoints.same_run import SameRun
from fastgrpo.distributed.world import World
from fastgrpo.image_replay import ImageReplay
from fastgrpo.learning_rate import LearningRate
from fastgrpo.models.adapter import FlowModel
from fastgrpo.parts import RunParts, build_rewards
from fastgrpo.rewards.ranks import PolicyRank
from fastgrpo.rollout import ImageRollout, StepRollout
from fastgrpo.step_replay import StepReplay
from fastgrpo.trainer import Trainer
from tests.test_trainer import release
from tests.tiny_config import make_config

UNUSUAL = (
    "seed=5",
    "algorithm.schedule.num_steps=5",
    "solver=adams_bashforth",
    "train.iterations=9",
    "train.max_minutes=3.0",
    "train.optimizer_steps=2",
    "train.learning_rate=3e-3",
    "train.weight_decay=0.25",
    "train.max_grad_norm=0.125",
    "train.ema_decay=0.75",
    "evaluate.every=7",
    "evaluate.images_per_prompt=2",
    "evaluate.num_steps=3",
    "checkpoint.every=4",
    "checkpoint.keep=3",
    "checkpoint.asynchronous=false",
    "runtime.micro_batch=3",
    "runtime.sampling_batch=2",
    "runtime.decode_batch=1",
)


def make_trainer(weights: Path, output: Path, *overrides: str) -> Trainer:
    return build_trainer(make_config(weights, output, *overrides))


@pytest.fixture(scope="module")
def built(tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return make_trainer(tiny_weights, tmp_path_factory.mktemp("built") / "run", *UNUSUAL)


# build_trainer


def test_every_key_reaches_the_piece_that_it_is_of(built: Trainer) -> None:
    (group,) = built.update.optimizer.param_groups
    algorithm = built.algorithm
    rollout, replay = built.rollout, built.update.replay
    assert isinstance(rollout, StepRollout)
    assert isinstance(replay, StepReplay)
    assert {
        "seeds": (built.seed, built.prompts.seed, rollout.seed, built.start_noise.seed, built.update.seed),
        "iterations": (built.num_iterations, built.start_noise.num_iterations),
        "seconds": built.max_seconds,
        "samples": (built.prompts.prompts_per_iteration, built.group_size),
        "optimizer": (built.update.optimizer_steps, group["lr"], group["weight_decay"], built.update.max_grad_norm),
        "ema": built.ema.decay,
        "evaluation": (built.evaluate_every, built.evaluation.images_per_prompt, len(built.evaluation.grid)),
        "evaluation's seed": built.evaluation.seed,
        "checkpoint": (built.checkpoint.every, built.checkpoint.keep, built.checkpoint.asynchronous),
        "grids": (list(rollout.sampler.grid), list(replay.grid)),
        # 6 samples in two optimizer steps
        "batches": tuple(size.value for size in vars(rollout.sampler.batch_sizes).values()),
    } == {
        "seeds": (5, 5, 5, 5, 5),
        "iterations": (9, 9),
        "seconds": 180.0,
        "samples": (2, 3),
        "optimizer": (2, 3e-3, 0.25, 0.125),
        "ema": 0.75,
        "evaluation": (7, 2, 4),
        "evaluation's seed": 0,
        "checkpoint": (4, 3, False),
        "grids": (list(algorithm.grid), list(algorithm.grid)),
        "batches": (3, 2, 1),
    }


def test_pieces_that_must_be_one_are_one(built: Trainer) -> None:
    """A copy would train other weights, halve other batches, or score by other rewards."""
    rollout, update, replay = built.rollout, built.update, built.update.replay
    assert isinstance(rollout, StepRollout)
    assert isinstance(replay, StepReplay)
    sampler = rollout.sampler
    assert built.start_noise.sampler is sampler
    assert built.model is sampler.model is update.model is replay.model is built.evaluation.model
    assert update.batch_size is sampler.batch_sizes.training
    assert built.rewards is built.start_noise.rewards is built.evaluation.rewards
    assert built.algorithm is built.start_noise.algorithm
    assert (rollout.dynamics, replay.dynamics) == (built.algorithm.dynamics, built.algorithm.dynamics)
    assert replay.objective is built.algorithm.objective
    assert rollout.timesteps is built.algorithm.timesteps
    assert sampler.solver.stride == 2  # type: ignore[attr-defined]
    (group,) = update.optimizer.param_groups
    assert [id(weight) for weight in group["params"]] == [id(weight) for weight in built.model.trainable.values()]
    assert built.ema._weights.keys() == built.model.trainable.keys()


UNUSUAL_IMAGES = (
    "seed=5",
    "algorithm=nft",
    "algorithm.schedule.num_steps=3",
    "algorithm.timesteps.per_image=2",
    "train.updates=3",
    "train.max_drift=0.5",
    "train.warmup_iterations=2",
    "train.decay_share=0.34",
    "train.decay_to=0.5",
    "train.iterations=9",
    "train.old_policy_growth=0.2",
    "train.old_policy_limit=0.3",
    "train.ema_share=0.4",
    "runtime.micro_batch=3",
    "runtime.sampling_batch=2",
)


def test_every_key_of_learning_from_images_reaches_its_piece(tiny_weights: Path, tmp_path: Path) -> None:
    built = make_trainer(tiny_weights, tmp_path / "run", *UNUSUAL_IMAGES)
    rollout, update, replay = built.rollout, built.update, built.update.replay
    assert isinstance(rollout, ImageRollout)
    assert isinstance(replay, ImageReplay)
    assert (update.updates, update.max_drift, built.ema.share) == (3, 0.5, 0.4)
    assert update.learning_rate == LearningRate(
        peak=1e-3, num_iterations=9, warmup_iterations=2, decay_iterations=3, decay_to=0.5
    )
    assert (built.old_policy.growth, built.old_policy.limit) == (0.2, 0.3)
    assert replay.old_policy is built.old_policy
    assert replay.model is built.model is rollout.sampler.model
    assert replay.sampling is rollout.sampler.batch_sizes.sampling
    assert update.batch_size is rollout.sampler.batch_sizes.training
    assert (replay.times, replay.objective) == (built.algorithm.timesteps, built.algorithm.objective)
    assert replay.seed == 5
    assert list(rollout.sampler.grid) == list(built.algorithm.grid)
    # two steps of SD3's own grid
    assert list(built.evaluation.grid) == list(SD3Schedule(2)())


@pytest.mark.parametrize("growth", [0.0, 0.2])
def test_the_memory_plan_knows_what_an_iteration_keeps(growth: float, tiny_weights: Path, tmp_path: Path) -> None:
    words = (*UNUSUAL_IMAGES, "train.optimizer_steps=2", f"train.old_policy_growth={growth}")
    config = make_config(tiny_weights, tmp_path / "run", *words)
    planner = _planner(RunParts.read(config), build_rewards(config)[0], World())
    assert (planner.updates, planner.optimizer_steps, planner.lags, planner.reweights) == (3, 2, growth > 0, False)


@pytest.mark.parametrize(("recipe", "updates"), [("nft", 6), ("flow_grpo", 1)])
def test_updates_are_the_signals_where_nothing_is_said(
    recipe: str, updates: int, tiny_weights: Path, tmp_path: Path
) -> None:
    built = make_trainer(tiny_weights, tmp_path / "run", f"algorithm={recipe}")
    assert built.update.updates == updates


def test_draws_and_checks_are_of_the_iteration_that_runs(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tiny_weights, tmp_path / "run", *UNUSUAL_IMAGES)
    begun: list[int] = []
    begin = ImageReplay.begin

    def watching(self, trained, conditions_B, iteration, *counts):
        begun.append(iteration)
        assert counts == (3, 1)
        assert trained.samples.prompts.ids == [2 * iteration, 2 * iteration + 1]
        return begin(self, trained, conditions_B, iteration, *counts)

    monkeypatch.setattr(ImageReplay, "begin", watching)
    rates = [trainer.step()["learning_rate"] for _ in range(3)]
    assert begun == [0, 1, 2]
    assert rates == pytest.approx([5e-4, 1e-3, 1e-3])


def test_training_and_evaluation_have_their_own_prompts(tiny_weights: Path, tmp_path: Path) -> None:
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("three green squares\n")
    trainer = make_trainer(tiny_weights, tmp_path / "run", f"prompts.held_out={held_out}")
    assert list(trainer.evaluation.texts) == ["three green squares"]
    assert "three green squares" not in trainer.prompts.texts


def test_the_runtime_and_what_is_lossy_reach_the_model(tiny_weights: Path, tmp_path: Path) -> None:
    made: list[dict[str, Any]] = []
    config = make_config(tiny_weights, tmp_path / "run", "lossy=fp8", "compile=blocks", "runtime.checkpointing=true")
    parts = RunParts.read(config)
    source = parts.model

    def make(**given: Any) -> FlowModel:
        made.append(given)
        return source.make(**given)

    dataclasses.replace(source, make=make)()
    (given,) = made
    assert given["checkpointing"] is True
    assert (given["attention"], given["device"]) == ("auto", "cpu")
    assert (type(given["lossy"]).__name__, type(given["compile"]).__name__) == ("Fp8", "CompiledBlocks")


def test_nothing_is_written_before_everything_is_known_to_work(tiny_weights: Path, tmp_path: Path) -> None:
    for word in (
        "train.optimizer_steps=7",
        "evaluate.num_steps=0",
        "algorithm.noise.candidates=0",
        "model.guidance_scale=0.5",
        "runtime.attention=flash3",
        "adaptation.rank=0",
        "algorithm.dynamics.noise_level=-1.0",
    ):
        with pytest.raises(ValueError):  # noqa: PT011
            make_trainer(tiny_weights, tmp_path / "run", "algorithm=smart_grpo", "algorithm/noise=elite", word)
        assert not (tmp_path / "run").exists(), word


# Trainer.step


class Spy:
    """A piece of a trainer that keeps what it was given and what it returned."""

    def __init__(self, trainer: Trainer, name: str) -> None:
        self.piece = getattr(trainer, name)
        self.calls: list[tuple[Any, Any]] = []
        self.returned: list[Any] = []
        setattr(trainer, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        self.returned.append(self.piece(*args, **kwargs))
        return self.returned[-1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.piece, name)


ALL_STEPS = ("algorithm/timesteps=all_but_last", "algorithm.advantage.std=group")


def test_rows_of_an_optimizer_step_keep_their_noise_condition_reward_and_advantage(
    tiny_weights: Path, tmp_path: Path
) -> None:
    """With two optimizer steps the rows are permuted; row by row they are those of the run with one."""
    given: list[dict[int, tuple[Tensor, ...]]] = []
    for steps in (1, 2):
        trainer = make_trainer(tiny_weights, tmp_path / f"{steps}", *ALL_STEPS, f"train.optimizer_steps={steps}")
        rollout, update = Spy(trainer, "rollout"), Spy(trainer, "update")
        trainer.step()
        (trained, conditions, advantages_B, shares, _), _ = update.calls[0]
        (samples, *_), _ = rollout.calls[0]
        assert [row for share in shares for row in share] == list(samples.rows)
        images_BCHW = rollout.returned[0].images_BCHW
        given.append(
            {
                row: (
                    trained.x_TBCHW[:, b], trained.x_next_TBCHW[:, b], trained.log_prob_TB[:, b],
                    conditions.embeds_BLC[b], images_BCHW[b], advantages_B[b],
                )
                for b, row in enumerate(samples.rows)
            }
        )  # fmt: skip
    in_order, permuted = given
    assert list(in_order) == sorted(permuted) == list(range(6))
    assert list(permuted) != list(in_order)
    for row in range(6):
        # batches of other sizes round otherwise; rows of one group differ by far more
        for a, b in zip(in_order[row], permuted[row], strict=True):
            torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3)
    advantages = torch.stack([parts[-1] for parts in in_order.values()]).view(2, 3)
    assert advantages.sum(dim=1).abs().max() < 1e-5
    assert advantages.abs().min() > 1e-3


def first_pixel(images_BCHW: Tensor, prompts: list[str]) -> Tensor:
    return images_BCHW[:, 0, 0, 0]


def hundred_times_last_pixel(images_BCHW: Tensor, prompts: list[str]) -> Tensor:
    return 100 * images_BCHW[:, 0, -1, -1]


def test_advantages_are_made_of_what_is_learned_from_and_not_of_the_total(tiny_weights: Path, tmp_path: Path) -> None:
    """GDPO: each reward counts by its weight, whatever its scale."""
    mine = "tests.test_seams"
    settings = (
        *ALL_STEPS, "reward=custom", f"reward.path={mine}.first_pixel", "reward.golden=false", "reward.normalize=true",
        "+reward/terms@reward.terms.second=custom", f"reward.terms.second.path={mine}.hundred_times_last_pixel",
        "+reward.weights.second=0.5",
    )  # fmt: skip
    trainer = make_trainer(tiny_weights, tmp_path / "run", *settings)
    rollout, update = Spy(trainer, "rollout"), Spy(trainer, "update")
    trainer.step()
    images_BCHW = rollout.returned[0].images_BCHW
    small_PG, large_PG = first_pixel(images_BCHW, []).view(2, 3), 100 * images_BCHW[:, 0, -1, -1].view(2, 3)

    def normal(r_PG: Tensor) -> Tensor:
        return (r_PG - r_PG.mean(1, keepdim=True)) / (r_PG.std(1, correction=0, keepdim=True) + 1e-4)

    expected_PG = normal(normal(small_PG) + 0.5 * normal(large_PG))
    torch.testing.assert_close(update.calls[0][0][2].view(2, 3), expected_PG, atol=1e-3, rtol=1e-3)
    assert (expected_PG - normal(small_PG + 0.5 * large_PG)).abs().max() > 0.05


def test_the_average_is_of_the_weights_after_the_optimizer_step(tiny_weights: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_weights, tmp_path / "run", "train.learning_rate=1e-2", "train.ema_decay=0.9")
    before = {name: weight.detach().clone() for name, weight in trainer.model.trainable.items()}
    trainer.step()
    # the decay of the first update is ramped: (1 + 1) / (10 + 1)
    for name, weight in trainer.model.trainable.items():
        torch.testing.assert_close(trainer.ema.averages[name], before[name] + (weight - before[name]) * 9 / 11)
    assert any(not torch.equal(weight, before[name]) for name, weight in trainer.model.trainable.items())


def test_weight_decay_shrinks_what_no_gradient_moves(tiny_weights: Path, tmp_path: Path) -> None:
    settings = ("train.learning_rate=0.1", "train.weight_decay=0.5", "algorithm.objective.kl_coef=0.0")
    trainer = make_trainer(tiny_weights, tmp_path / "run", *settings)
    before = {name: weight.detach().clone() for name, weight in trainer.model.trainable.items()}
    still = dataclasses.replace(trainer.algorithm, advantage=torch.zeros_like)  # type: ignore[arg-type]
    trainer.algorithm = still
    trainer.step()
    for name, weight in trainer.model.trainable.items():
        torch.testing.assert_close(weight.detach(), before[name] * (1 - 0.1 * 0.5))


def test_each_iteration_has_its_own_prompts_noise_window_and_shares(tiny_weights: Path, tmp_path: Path) -> None:
    settings = ("algorithm=flow_grpo_fast", "algorithm.schedule.num_steps=7", "train.optimizer_steps=2")
    trainer = make_trainer(tiny_weights, tmp_path / "run", *settings)
    rollout, noise, update = Spy(trainer, "rollout"), Spy(trainer, "start_noise"), Spy(trainer, "update")
    for _ in range(4):
        trainer.step()
    for iteration in range(4):
        (samples, _, start_noise, of_iteration, _), _ = rollout.calls[iteration]
        assert samples.prompts == trainer.prompts.at(iteration)
        assert noise.calls[iteration][0] == (samples, iteration)
        assert start_noise is noise.returned[iteration]
        assert of_iteration == iteration
        steps = rollout.returned[iteration].trained.steps
        assert steps == trainer.algorithm.steps(7, iteration, trainer.seed)
        assert update.calls[iteration][0][3] == update.shares(6, iteration)
        assert update.calls[iteration][1] == {"iteration": iteration}
    assert len({returned.trained.steps for returned in rollout.returned}) > 1
    assert len({str(call[0][3]) for call in update.calls}) > 1
    assert len({call[0][0].prompts.ids[0] for call in rollout.calls}) == 4


@pytest.mark.parametrize("is_shared", [True, False])
def test_whether_a_group_shares_its_noise_is_what_the_proposal_says(
    is_shared: bool, tiny_weights: Path, tmp_path: Path
) -> None:
    noise = "algorithm/noise=" + ("shared" if is_shared else "gaussian")
    trainer = make_trainer(tiny_weights, tmp_path / "run", noise)
    rollout = Spy(trainer, "rollout")
    trainer.step()
    start = rollout.calls[0][0][2]
    assert start.is_shared is is_shared
    assert torch.equal(start.start_BCHW[0], start.start_BCHW[1]) is is_shared


def test_the_gradients_of_a_rollout_are_those_that_the_update_uses(tiny_weights: Path, tmp_path: Path) -> None:
    settings = ("algorithm=flow_grpo_fast", "algorithm.schedule.num_steps=7", "train.gradients=reweight")
    trainer = make_trainer(tiny_weights, tmp_path / "run", *settings, "train.optimizer_steps=2")
    rollout, update = Spy(trainer, "rollout"), Spy(trainer, "update")
    trainer.step()
    gradients = update.calls[0][0][4]
    assert gradients is rollout.returned[0].gradients
    assert sum(part.log_prob_TB.shape[1] for part in gradients) == rollout.calls[0][1]["num_differentiated"] == 3


# resume


def test_a_resumed_trainer_is_the_one_that_saved(tiny_weights: Path, tmp_path: Path) -> None:
    settings = ("train.iterations=6", "train.optimizer_steps=2", "train.learning_rate=1e-2", "checkpoint.every=2")
    trainer = make_trainer(tiny_weights, tmp_path / "run", *settings)
    for _ in range(3):
        trainer.step()
    trainer.seconds, trainer.health.skipped_in_a_row = 1234.5, 2
    trainer._unrecorded = {"loss": float("nan"), "reward/total": 0.1}
    trainer.checkpoint.save(trainer.state())
    trainer.checkpoint.wait()
    release(trainer)
    resumed = make_trainer(tiny_weights, tmp_path / "run", *settings, "resume=true")
    resumed.resume()
    assert (resumed.iteration, resumed.seconds, resumed.health.skipped_in_a_row) == (3, 1234.5, 2)
    assert str(resumed._unrecorded) == str(trainer._unrecorded)
    assert resumed.ema.num_updates == trainer.ema.num_updates == 3
    assert all(torch.equal(average, trainer.ema.averages[name]) for name, average in resumed.ema.averages.items())
    for name, weight in resumed.model.trainable.items():
        assert torch.equal(weight, trainer.model.trainable[name])
    assert any(not torch.equal(w, trainer.ema.averages[name]) for name, w in resumed.model.trainable.items())
    states = [t.update.optimizer.state_dict() for t in (trainer, resumed)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    for number, state in states[0]["state"].items():
        assert all(torch.equal(value, states[1]["state"][number][key]) for key, value in state.items())
    # and goes on as the other does
    steps = [{k: v for k, v in t.step().items() if "second" not in k and k != "peak_bytes"} for t in (trainer, resumed)]
    assert steps[0] == steps[1]
    assert resumed.iteration == 4


def test_a_resumed_run_steps_at_the_rate_of_its_config(tiny_weights: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_weights, tmp_path / "run", "train.iterations=6", "train.learning_rate=1e-2")
    trainer.step()
    trainer.checkpoint.save(trainer.state())
    trainer.checkpoint.wait()
    release(trainer)
    resumed = make_trainer(tiny_weights, tmp_path / "run", "resume=true", "train.learning_rate=1e-7")
    resumed.resume()
    before = [weight.detach().clone() for weight in resumed.model.trainable.values()]
    resumed.step()
    moved = max((w - b).abs().max().item() for w, b in zip(resumed.model.trainable.values(), before, strict=True))
    assert 0 < moved < 1e-6


def test_a_recipe_may_be_assembled_from_parts_alone(tiny_weights: Path, tmp_path: Path) -> None:
    """Nothing below the parts sees a config: another algorithm in its place is the one that runs."""
    parts = RunParts.read(make_config(tiny_weights, tmp_path / "run"))
    parts = dataclasses.replace(parts, seed=11)
    run = SameRun.find(parts.output, parts.config, resume=False, world=World())
    trainer = assemble(parts, PolicyRank(world=World()), run)
    assert isinstance(trainer.rollout, StepRollout)
    assert trainer.rollout.seed == 11
    # as the default config says, and not as the class does
    assert trainer.checkpoint.asynchronous
