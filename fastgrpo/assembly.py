"""The parts of a run -> a trainer, which is everything that it is made of, put together from top to bottom."""

import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import DictConfig

from fastgrpo.algorithm.algorithm import Algorithm
from fastgrpo.algorithm.learned_noise import LearnedNoise
from fastgrpo.algorithm.noise import Starts, plain_starts
from fastgrpo.checkpoints.checkpoint import Checkpoint
from fastgrpo.checkpoints.same_run import SameRun
from fastgrpo.distributed.world import World
from fastgrpo.ema import EMA
from fastgrpo.evaluation import Evaluation
from fastgrpo.health import Health
from fastgrpo.memory.batches import BatchSizes
from fastgrpo.memory.device import device_of, set_threads
from fastgrpo.memory.model_on_device import planned_model
from fastgrpo.memory.stages import MemoryPlanner
from fastgrpo.models.adapter import FlowModel
from fastgrpo.numerics import set_numerics
from fastgrpo.old_policy import OldPolicy
from fastgrpo.parts import RunParts
from fastgrpo.profiling.profile import Profile, unprofiled
from fastgrpo.prompts import PromptSource, longest
from fastgrpo.proposal.learner import Learner, NothingLearned, ProposalLearner
from fastgrpo.proposal.network import ProposalNetwork, ProposalShape, features
from fastgrpo.records.metrics import Metrics
from fastgrpo.records.record import NoRecord, Record, Recorder, no_report
from fastgrpo.records.stragglers import Stragglers
from fastgrpo.retry import Retry
from fastgrpo.rewards.ranks import PolicyRank
from fastgrpo.rewards.source import Loaded
from fastgrpo.rewards.weighted_sum import Rewards
from fastgrpo.sampler import Sampler
from fastgrpo.settings import Evaluating, Runtime
from fastgrpo.signals import make_replay, make_rollout, rehearsal
from fastgrpo.start_noise import StartNoise
from fastgrpo.step_noise import StepNoise
from fastgrpo.trainer import Trainer
from fastgrpo.types import Prompt
from fastgrpo.update import Update


def build_trainer(config: DictConfig, part: PolicyRank | None = None) -> Trainer:
    """The trainer of a checked ``train`` config, in its run directory, which is made."""
    parts, part = RunParts.read(config), part or PolicyRank(world=World())
    return assemble(parts, part, find_run(parts, part.world))


def assemble(parts: RunParts, part: PolicyRank, run: SameRun) -> Trainer:
    """Everything that a run is made of, top to bottom; its directory comes last, when nothing can be wrong any more."""
    world, training, algorithm = part.world, parts.training, parts.algorithm
    prompts = PromptSource(parts.prompts, training.prompts_per_iteration, parts.seed)
    rewards, golden_scores = load_rewards(parts) if part.scores_itself else parts.rewards.ask(part)
    checkpoint = _checkpoint(parts, run)
    source = replace(parts.model, runtime=run.sizes(parts.runtime))
    if source.starts_from_lora and run.is_begun:
        source = source.going_on(run.config["adaptation"], has_checkpoint=checkpoint.latest() is not None)
    on_device = planned_model(source, _planner(parts, rewards, world), world.group)
    model, rewards = on_device.model, on_device.rewards
    runtime = run.agree(on_device.runtime, model)
    batch_sizes = BatchSizes.of_runtime(runtime, *_most_samples(parts, world))
    sampler = Sampler(model=model, grid=algorithm.grid, batch_sizes=batch_sizes, solver=parts.solver)
    proposal = _proposal(parts, model, world)
    start_noise = StartNoise(
        algorithm=algorithm,
        sampler=sampler,
        rewards=rewards,
        num_iterations=training.iterations,
        seed=parts.seed,
        world=world,
        proposal=proposal,
    )
    step_noise = StepNoise(algorithm=algorithm, sampler=sampler, rewards=rewards, seed=parts.seed, world=world)
    rollout = make_rollout(algorithm, sampler, parts.seed, step_noise)
    old_policy = OldPolicy(model.trainable, training.old_policy_growth, training.old_policy_limit)
    update = Update(
        model=model,
        replay=make_replay(algorithm, model, old_policy, batch_sizes.sampling, parts.seed),
        optimizer=_optimizer(parts, model),
        optimizer_steps=training.optimizer_steps,
        updates=training.num_updates,
        learning_rate=training.learning_rates,
        max_drift=training.max_drift,
        max_grad_norm=training.max_grad_norm,
        batch_size=batch_sizes.training,
        seed=parts.seed,
        reweights=training.reweights,
        world=world,
    )
    # refuses ranks without samples before anything is written
    update.shares(training.num_samples, iteration=0)
    ema = EMA(model.trainable, training.ema_decay, training.ema_share)
    evaluation = build_evaluation(parts.evaluating, runtime, model, rewards, algorithm, parts.held_out, world)
    run.claim(golden_scores)
    world.on_first(lambda: parts.given.keep(run.directory.path), "prompts")
    return Trainer(
        prompts=prompts,
        group_size=training.group_size,
        model=model,
        algorithm=algorithm,
        start_noise=start_noise,
        rollout=rollout,
        retry=Retry(start_noise=start_noise, rollout=rollout, rewards=rewards, world=world),
        rewards=rewards,
        update=update,
        old_policy=old_policy,
        ema=ema,
        evaluation=evaluation,
        evaluate_every=parts.evaluating.every,
        checkpoint=checkpoint,
        keep_best=parts.saving.keep_best,
        health=Health(failed_batch=run.directory.failed_batch(world.rank)),
        record=_record(parts, run),
        num_iterations=training.iterations,
        max_seconds=60 * training.max_minutes,
        seed=parts.seed,
        world=world,
        proposal=proposal,
        plan=on_device.plan,
        is_stopped=parts.given.is_stopped,
        profile=_profile(parts, run, model) if parts.runtime.profile and world.is_first else unprofiled,
    )


def build_evaluation(
    evaluating: Evaluating,
    runtime: Runtime,
    model: FlowModel,
    rewards: Rewards,
    algorithm: Algorithm,
    prompts: Sequence[Prompt],
    world: World | None = None,
    starts: Starts = plain_starts,
) -> Evaluation:
    """Evaluation on ``prompts``; its noise is the same in every run, whatever the seed, drawn as ``starts`` has it."""
    return Evaluation(
        model=model,
        rewards=rewards,
        prompts=prompts,
        images_per_prompt=evaluating.images_per_prompt,
        grid=algorithm.evaluation_grid(evaluating.num_steps),
        batch_sizes=BatchSizes.of_runtime(runtime),
        seed=0,
        world=world or World(),
        starts=starts,
    )


def find_run(parts: RunParts, world: World) -> SameRun:
    """The run in the directory of these parts, new or begun, of which all ranks know the same."""
    return SameRun.find(parts.output, parts.config, resume=parts.resume, world=world)


def load_rewards(parts: RunParts) -> Loaded:
    """The rewards of a run, in this process."""
    set_threads(parts.runtime)
    set_numerics(deterministic=parts.runtime.deterministic)
    return parts.rewards.load([*parts.prompts, *parts.held_out], device_of(parts.runtime))


def _planner(parts: RunParts, rewards: Rewards, world: World) -> MemoryPlanner:
    return MemoryPlanner(
        algorithm=parts.algorithm,
        make_replay=rehearsal(parts.algorithm),
        samples=-(-parts.training.num_samples // world.size),
        optimizer_steps=parts.training.optimizer_steps,
        updates=parts.training.num_updates,
        rewards=rewards,
        # the longest takes most memory, where texts are as long as they are
        prompt=longest([*parts.prompts, *parts.held_out]),
        reweights=parts.training.reweights,
        lags=parts.training.old_policy_growth > 0,
    )


def _most_samples(parts: RunParts, world: World) -> tuple[int, int]:
    """Of the rank that has most: samples of an optimizer step, and of an iteration."""
    training = parts.training
    return -(-training.num_samples // (world.size * training.optimizer_steps)), -(-training.num_samples // world.size)


def _optimizer(parts: RunParts, model: FlowModel) -> torch.optim.AdamW:
    weights, training = list(model.trainable.values()), parts.training
    return torch.optim.AdamW(weights, lr=training.learning_rate, weight_decay=training.weight_decay, fused=True)


def _proposal(parts: RunParts, model: FlowModel, world: World) -> Learner:
    """What learns the start noise's distribution, where the algorithm has it learned; the planner ignores its size."""
    noise = parts.algorithm.noise
    if not isinstance(noise, LearnedNoise):
        return NothingLearned()
    shape = ProposalShape(
        channels=model.latent_shape[0],
        # only a condition says how wide it is
        text_width=features(model.encode(parts.texts[:1])).shape[1],
        width=noise.width,
        cells=noise.cells,
        learns_std=noise.learns_std,
        max_kl=noise.max_kl,
    )
    network = ProposalNetwork(shape, parts.seed).to(model.device)
    return ProposalLearner(network, noise.learning_rate, world)


def _checkpoint(parts: RunParts, run: SameRun) -> Checkpoint:
    saving = parts.saving
    return Checkpoint(run.directory.checkpoints, saving.every, saving.keep, run.world, saving.asynchronous)


def _record(parts: RunParts, run: SameRun) -> Recorder:
    hosts = run.world.everyones(socket.gethostname(), "hosts")
    if not run.world.is_first:
        return NoRecord()
    return Record(
        directory=run.directory,
        metrics=Metrics(run.directory, wandb_project="fastgrpo" if parts.logs_to_wandb else None, config=parts.config),
        stragglers=Stragglers(path=run.directory.ranks, hosts=hosts),
        make_report=_make_report if parts.makes_report else no_report,
    )


def _make_report(directory: Path) -> Path:
    # plots take most of a second to import, which a run that has not ended need not wait for
    from fastgrpo.report.page import write_report

    return write_report([directory])


def _profile(parts: RunParts, run: SameRun, model: FlowModel) -> Profile:
    return Profile(
        directory=run.directory.path / "profile",
        device=model.device,
        dtype=parts.dtype,
        num_iterations=parts.training.iterations,
    )
