"""Hydra config -> objects -> ``Trainer.run()``.  Each key of ``configs/train.yaml`` is read here, once."""

import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from fastgrpo.algorithm.algorithm import Algorithm
from fastgrpo.checkpoints.checkpoint import Checkpoint, CheckpointError
from fastgrpo.checkpoints.same_run import agree, open_directory
from fastgrpo.config import build, resolve_path
from fastgrpo.distributed.watch import Watch
from fastgrpo.distributed.world import RankFailure, World, leave_world
from fastgrpo.ema import EMA
from fastgrpo.evaluate import Evaluation
from fastgrpo.files.run_directory import RunDirectory
from fastgrpo.health import Health, TrainingError
from fastgrpo.memory.model_on_device import build_batch_sizes, build_planned_model, device_of, set_threads
from fastgrpo.memory.stages import MemoryPlanner
from fastgrpo.models.adapter import FlowModel
from fastgrpo.profiling.profile import Profile, unprofiled
from fastgrpo.prompts import PromptSource, load_prompts
from fastgrpo.records.metrics import Metrics
from fastgrpo.records.record import NoRecord, Record, Recorder
from fastgrpo.records.stragglers import Stragglers
from fastgrpo.rewards.ranks import PolicyRank, ScoringRank, take_part
from fastgrpo.rewards.reward import RewardError
from fastgrpo.rewards.self_test import GoldenScores, self_test
from fastgrpo.rewards.weighted_sum import Rewards
from fastgrpo.rollout import Rollout
from fastgrpo.start_noise import StartNoise
from fastgrpo.trainer import Trainer
from fastgrpo.update import Update


def train(config: DictConfig) -> Path:
    """Run a checked ``train`` config to its end, on all ranks that a launcher started; returns the run directory."""
    settings = config.distributed
    part = take_part(device_of(config), settings.timeout_seconds, settings.reward_ranks)
    if isinstance(part, ScoringRank):
        part.serve(lambda: build_rewards(config, prompts=[text for texts in _load_texts(config) for text in texts]))
        return Path(config.output)
    watch = Watch(
        world=part.world,
        timeout_seconds=settings.timeout_seconds,
        every_seconds=settings.beat_seconds,
        dead_after_seconds=settings.dead_after_seconds,
        agreed=(TrainingError, RewardError, CheckpointError, RankFailure),
    )
    # left in reverse order: what failed is published before the scoring rank is told
    with part, watch:
        trainer = build_trainer(config, part)
        watch.iteration = lambda: trainer.iteration
        trainer.resume()
        trainer.run()
        if trainer.model.has_lora and part.world.is_first:
            with trainer.ema.applied():
                trainer.model.save_lora(RunDirectory(Path(config.output)).lora)
    leave_world()
    return Path(config.output)


def build_trainer(config: DictConfig, part: PolicyRank | None = None) -> Trainer:
    """Everything a run needs, checked before the first forward pass; makes the run directory."""
    part = part or PolicyRank(world=World())
    world = part.world
    settings = config.train
    _check_positive(config, "train.iterations", "evaluate.every", "train.learning_rate", "train.max_minutes")
    texts, held_out = _load_texts(config)
    prompts = PromptSource(texts, settings.prompts_per_iteration, config.seed)
    algorithm: Algorithm = build(config.algorithm)
    rewards, golden_scores = (
        build_rewards(config, prompts=texts + held_out) if part.scores_itself else _asked_rewards(config, part)
    )
    directory = open_directory(config, golden_scores, world)
    num_samples = settings.prompts_per_iteration * settings.group_size
    most, most_in_share = (-(-num_samples // parts) for parts in (world.size, world.size * settings.optimizer_steps))
    planner = MemoryPlanner(
        algorithm=algorithm,
        samples=most,
        optimizer_steps=settings.optimizer_steps,
        rewards=rewards,
        prompt=texts[0],
        reweights=_reweights(config),
    )
    model, rewards = build_planned_model(config, planner)
    agree(config, model, world)
    model.shard(world.group)
    grid = algorithm.grid
    batch_sizes = build_batch_sizes(config, most_in_share, most)
    rollout = Rollout(
        model=model,
        grid=grid,
        dynamics=algorithm.dynamics,
        batch_sizes=batch_sizes,
        seed=config.seed,
        solver=build(config.solver),
    )
    start_noise = StartNoise(
        algorithm=algorithm,
        rollout=rollout,
        rewards=rewards,
        num_iterations=settings.iterations,
        seed=config.seed,
        world=world,
    )
    optimizer = torch.optim.AdamW(
        list(model.trainable.values()), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    update = Update(
        model=model,
        grid=grid,
        dynamics=algorithm.dynamics,
        objective=algorithm.objective,
        optimizer=optimizer,
        optimizer_steps=settings.optimizer_steps,
        max_grad_norm=settings.max_grad_norm,
        batch_size=batch_sizes.training,
        seed=config.seed,
        reweights=planner.reweights,
        world=world,
    )
    # refuses ranks without samples before any is made
    update.shares(num_samples, iteration=0)
    if world.is_first:
        OmegaConf.save(config, directory.config)
    return Trainer(
        prompts=prompts,
        group_size=settings.group_size,
        model=model,
        algorithm=algorithm,
        start_noise=start_noise,
        rollout=rollout,
        rewards=rewards,
        update=update,
        ema=EMA(model.trainable, settings.ema_decay),
        evaluation=build_evaluation(config, model, rewards, algorithm, held_out, world),
        evaluate_every=config.evaluate.every,
        checkpoint=Checkpoint(
            directory.checkpoints,
            config.checkpoint.every,
            config.checkpoint.keep,
            world,
            config.checkpoint.asynchronous,
        ),
        health=Health(failed_batch=directory.failed_batch(world.rank), clip_range=algorithm.objective.clip_range),
        record=_build_record(config, directory, world),
        num_iterations=settings.iterations,
        max_seconds=60 * settings.max_minutes,
        seed=config.seed,
        world=world,
        profile=_build_profile(config, directory, model) if config.runtime.profile and world.is_first else unprofiled,
    )


def _load_texts(config: DictConfig) -> tuple[list[str], list[str]]:
    """The prompts to train and to evaluate on."""
    return load_prompts(resolve_path(config.prompts.path)), load_prompts(resolve_path(config.prompts.held_out))


def _build_record(config: DictConfig, directory: RunDirectory, world: World) -> Recorder:
    hosts = world.everyones(socket.gethostname(), "hosts")
    if not world.is_first:
        return NoRecord()
    return Record(
        directory=directory,
        metrics=Metrics(directory, wandb_project="fastgrpo" if config.wandb else None),
        stragglers=Stragglers(path=directory.ranks, hosts=hosts),
    )


def _build_profile(config: DictConfig, directory: RunDirectory, model: FlowModel) -> Profile:
    dtype, iterations = getattr(torch, config.model.dtype), config.train.iterations
    return Profile(directory=directory.path / "profile", device=model.device, dtype=dtype, num_iterations=iterations)


def build_rewards(config: DictConfig, prompts: Sequence[str] = ()) -> tuple[Rewards, dict[str, GoldenScores]]:
    """The rewards of a config, which can judge ``prompts``, tried on golden pairs unless ``reward.golden`` is false."""
    set_threads(config)
    rewards: Rewards = build(config.reward)
    rewards.check_prompts(prompts)
    return rewards, self_test(rewards, device_of(config)) if rewards.golden else {}


def _asked_rewards(config: DictConfig, part: PolicyRank) -> tuple[Rewards, dict[str, GoldenScores]]:
    """The rewards of a config as this rank's scoring rank computes them, and the golden scores that it found."""
    # waits until the scoring rank has loaded them
    golden_scores = part.golden_scores()
    asked = {key: part.rewards(map(str, config.reward[key])) for key in ("terms", "watch")}
    others = OmegaConf.masked_copy(config.reward, [str(key) for key in config.reward if key not in asked])
    rewards: Rewards = build(others, **asked)
    return rewards, golden_scores


def build_evaluation(
    config: DictConfig,
    model: FlowModel,
    rewards: Rewards,
    algorithm: Algorithm,
    texts: list[str],
    world: World | None = None,
) -> Evaluation:
    """Evaluation as ``config.evaluate`` says; its noise is the same in every run, whatever the seed."""
    return Evaluation(
        model=model,
        rewards=rewards,
        texts=texts,
        images_per_prompt=config.evaluate.images_per_prompt,
        grid=algorithm.evaluation_grid(config.evaluate.num_steps),
        batch_sizes=build_batch_sizes(config),
        seed=0,
        world=world or World(),
    )


def _reweights(config: DictConfig) -> bool:
    """Whether train.gradients is reweight."""
    chosen = config.train.gradients
    if chosen not in ("replay", "reweight"):
        raise ValueError(f"train.gradients must be replay or reweight, got {chosen!r}")
    return chosen == "reweight"


def _check_positive(config: DictConfig, *keys: str) -> None:
    for key in keys:
        value: Any = OmegaConf.select(config, key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise ValueError(f"{key} must be a positive number, got {value!r}")


if __name__ == "__main__":
    # as torchrun calls it; errors and exit codes are those of the command
    from fastgrpo.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
