"""Hydra config -> objects -> ``Trainer.run()``.  Each key of ``configs/train.yaml`` is read here, once."""

import json
import socket
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from fastgrpo.algorithm.algorithm import Algorithm
from fastgrpo.checkpoint import Checkpoint
from fastgrpo.config import build, load_config, resolve_path
from fastgrpo.evaluate import Evaluation
from fastgrpo.health import Health
from fastgrpo.memory_stages import MemoryPlanner
from fastgrpo.metrics import Metrics
from fastgrpo.model_on_device import build_batch_sizes, build_planned_model, device_of, set_threads
from fastgrpo.models.adapter import FlowModel
from fastgrpo.prompts import PromptSource, load_prompts
from fastgrpo.record import NoRecord, Record, Recorder
from fastgrpo.records.run_directory import RunDirectory, write_whole
from fastgrpo.records.stragglers import Stragglers
from fastgrpo.rewards.self_test import GoldenScores, compare, self_test
from fastgrpo.rewards.weighted_sum import Rewards
from fastgrpo.rollout import Rollout
from fastgrpo.runtime.distributed import World, join_world, leave_world
from fastgrpo.runtime.ema import EMA
from fastgrpo.runtime.profile import Profile, unprofiled
from fastgrpo.start_noise import StartNoise
from fastgrpo.trainer import Trainer
from fastgrpo.update import Update


def train(config: DictConfig) -> Path:
    """Run a checked ``train`` config to its end, on all ranks that torchrun started; returns the run directory."""
    world = join_world(device_of(config), config.distributed.timeout_seconds)
    trainer = build_trainer(config, world)
    trainer.resume()
    trainer.run()
    directory = Path(config.output)
    if trainer.model.has_lora and world.is_first:
        with trainer.ema.applied():
            trainer.model.save_lora(RunDirectory(directory).lora)
    world.barrier("the end of the run")
    leave_world()
    return directory


def build_trainer(config: DictConfig, world: World | None = None) -> Trainer:
    """Everything a run needs, checked before the first forward pass; makes the run directory."""
    world = world or World()
    settings = config.train
    _check_positive(config, "train.iterations", "evaluate.every", "train.learning_rate", "train.max_minutes")
    texts, held_out = (load_prompts(resolve_path(path)) for path in (config.prompts.path, config.prompts.held_out))
    prompts = PromptSource(texts, settings.prompts_per_iteration, config.seed)
    algorithm: Algorithm = build(config.algorithm)
    rewards, golden_scores = build_rewards(config, prompts=texts + held_out)
    directory = _open_directory(config, golden_scores, world)
    num_samples = settings.prompts_per_iteration * settings.group_size
    num_in_step = max(1, num_samples // settings.optimizer_steps // world.size)
    planner = MemoryPlanner(
        algorithm=algorithm,
        samples=num_in_step * settings.optimizer_steps,
        optimizer_steps=settings.optimizer_steps,
        rewards=rewards,
        prompt=texts[0],
        reweights=_reweights(config),
    )
    _cut_as_begun(config, directory)
    model, rewards = build_planned_model(config, planner)
    _agree(config, model, world)
    grid = algorithm.grid
    batch_sizes = build_batch_sizes(config, at_most=num_in_step)
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
        checkpoint=Checkpoint(directory.checkpoints, config.checkpoint.every, config.checkpoint.keep, world),
        health=Health(failed_batch=directory.failed_batch(world.rank)),
        record=_build_record(config, directory, world),
        num_iterations=settings.iterations,
        max_seconds=60 * settings.max_minutes,
        seed=config.seed,
        world=world,
        profile=_build_profile(config, directory, model) if config.runtime.profile and world.is_first else unprofiled,
    )


def _open_directory(config: DictConfig, golden_scores: dict[str, GoldenScores], world: World) -> RunDirectory:
    """The run directory, which the first rank makes and holds."""
    held: list[RunDirectory] = []

    def make() -> None:
        held.append(RunDirectory.create(config.output, resume=config.resume))
        _hold_to_beginning(held[0], golden_scores, resume=config.resume)

    world.on_first(make, "the run directory")
    return held[0] if held else RunDirectory(Path(config.output))


def _build_record(config: DictConfig, directory: RunDirectory, world: World) -> Recorder:
    hosts = world.everyones(socket.gethostname(), "hosts")
    if not world.is_first:
        return NoRecord()
    return Record(
        directory=directory,
        metrics=Metrics(directory, wandb_project="fastgrpo" if config.wandb else None),
        stragglers=Stragglers(path=directory.ranks, hosts=hosts),
    )


def _agree(config: DictConfig, model: FlowModel, world: World) -> None:
    """Ranks must be one run: ValueError where they have different configs or weights; planned sizes are the least."""
    runtime = config.runtime
    for key in ("micro_batch", "sampling_batch", "decode_batch"):
        runtime[key] = min(world.everyones(int(runtime[key]), f"runtime.{key}"))
    runtime.checkpointing = any(world.everyones(bool(runtime.checkpointing), "runtime.checkpointing"))
    identity = {"config": OmegaConf.to_yaml(config), "weights": model.fingerprint, "version": version("fastgrpo")}
    for rank, other in enumerate(world.everyones(identity, "what is run")):
        for name, value in other.items():
            if value != identity[name]:
                raise ValueError(
                    f"rank {rank} runs with another {name} than rank {world.rank}: give all ranks the same"
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


def _hold_to_beginning(directory: RunDirectory, tested: dict[str, GoldenScores], *, resume: bool) -> None:
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
        for key in ("micro_batch", "sampling_batch", "decode_batch", "checkpointing"):
            config.runtime[key] = begun[key]


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
    train(load_config("train", sys.argv[1:]))
