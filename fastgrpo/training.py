"""A config -> its parts -> a trainer -> a run, from its first iteration or its last checkpoint to its end."""

import os
import shlex
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import DictConfig

from fastgrpo.algorithm.algorithm import Algorithm
from fastgrpo.algorithm.learned_noise import LearnedNoise
from fastgrpo.algorithm.noise import Starts, plain_starts
from fastgrpo.checkpoints.checkpoint import Checkpoint, CheckpointError
from fastgrpo.checkpoints.same_run import SameRun
from fastgrpo.distributed.watch import Watch
from fastgrpo.distributed.world import RankFailure, World, leave_world
from fastgrpo.ema import EMA
from fastgrpo.evaluation import Evaluation
from fastgrpo.given import NOTHING, Given
from fastgrpo.health import Health, Preempted, TrainingError
from fastgrpo.memory.batches import BatchSizes
from fastgrpo.memory.device import device_of, set_threads
from fastgrpo.memory.model_on_device import planned_model
from fastgrpo.memory.stages import MemoryPlanner
from fastgrpo.models.adapter import FlowModel, started
from fastgrpo.numerics import set_numerics
from fastgrpo.old_policy import OldPolicy
from fastgrpo.own_code.named import to_name_again
from fastgrpo.parts import RunParts
from fastgrpo.profiling.profile import Profile, unprofiled
from fastgrpo.prompts import PromptSource, longest, texts_to_encode
from fastgrpo.proposal.files import save_proposal
from fastgrpo.proposal.learner import Learner, NothingLearned, ProposalLearner
from fastgrpo.proposal.network import ProposalNetwork, ProposalShape, features
from fastgrpo.records.metrics import Metrics
from fastgrpo.records.model_card import ModelCard
from fastgrpo.records.record import NoRecord, Record, Recorder, no_report
from fastgrpo.records.stragglers import Stragglers
from fastgrpo.retry import Retry
from fastgrpo.rewards.ranks import PolicyRank, ScoringRank, take_part
from fastgrpo.rewards.reward import RewardError
from fastgrpo.rewards.source import Loaded
from fastgrpo.rewards.weighted_sum import Rewards
from fastgrpo.sampler import Sampler
from fastgrpo.settings import Evaluating, Runtime
from fastgrpo.signals import make_replay, make_rollout, rehearsal
from fastgrpo.start_noise import StartNoise
from fastgrpo.step_noise import StepNoise
from fastgrpo.trainer import Trainer
from fastgrpo.types import Prompt, as_prompts
from fastgrpo.update import Update

# prompts that are encoded before a run begins: minutes of a GPU, and 28 GB of disk, 1.7 MB each for SD3.5.  Others are
# encoded when they are met
_MOST_AHEAD = 2**14


def command_that_goes_on(parts: RunParts) -> str:
    """What the user may type after a run was stopped."""
    # what is in a config on disk is imported, or a token sent, only where the line names it
    words = f"{shlex.quote(f'output={parts.output}')} resume=true {to_name_again(parts.config)}"
    return f"fastgrpo train {words.strip()}"


def train(
    config: DictConfig, given: Given = NOTHING, what_goes_on: Callable[[RunParts], str] = command_that_goes_on
) -> Path:
    """Run a checked ``train`` config to its end, on all ranks that a launcher started; returns the run directory.

    ``given`` is what a program gives beside it; ``what_goes_on`` is shown where the run is stopped.
    """
    parts = RunParts.read(config, given)
    distribution = parts.distribution
    part = take_part(device_of(parts.runtime), distribution.timeout_seconds, distribution.reward_ranks)
    if isinstance(part, ScoringRank):
        part.serve(lambda: _load_rewards(parts))
        return parts.output
    world = part.world
    watch = Watch(
        world=world,
        timeout_seconds=distribution.timeout_seconds,
        every_seconds=distribution.beat_seconds,
        dead_after_seconds=distribution.dead_after_seconds,
        agreed=(TrainingError, RewardError, CheckpointError, RankFailure),
    )
    # left in reverse order: what failed is published before the scoring rank is told
    with part, watch:
        run = _find_run(parts, world)
        trainer = assemble(parts, part, run)
        _encode_ahead(parts, trainer)
        watch.iteration = lambda: trainer.iteration
        trainer.resume()
        if world.is_first:
            _say_what_to_know(parts, run, trainer)
        try:
            trainer.run()
        except Preempted:
            _write_weights(parts, trainer, run)
            if world.is_first:
                print(f"go on with: {what_goes_on(parts)}", flush=True)
            raise
        _write_weights(parts, trainer, run)
    leave_world()
    return parts.output


def build_trainer(config: DictConfig, part: PolicyRank | None = None) -> Trainer:
    """The trainer of a checked ``train`` config, in its run directory, which is made."""
    parts, part = RunParts.read(config), part or PolicyRank(world=World())
    return assemble(parts, part, _find_run(parts, part.world))


def assemble(parts: RunParts, part: PolicyRank, run: SameRun) -> Trainer:
    """Everything that a run is made of, top to bottom; its directory comes last, when nothing can be wrong any more."""
    world, training, algorithm = part.world, parts.training, parts.algorithm
    prompts = PromptSource(parts.prompts, training.prompts_per_iteration, parts.seed)
    rewards, golden_scores = _load_rewards(parts) if part.scores_itself else parts.rewards.ask(part)
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


def _encode_ahead(parts: RunParts, trainer: Trainer) -> None:
    """Conditions of the prompts that the run will meet: no text encoder comes to the GPU again while it trains.

    Ranks share the work, first all of them, then those of each node, whose disk may be its own.
    """
    model, world = trainer.model, trainer.world
    # no text stops a run that has begun
    model.check_texts(texts_to_encode([*parts.prompts, *parts.held_out]))
    texts = _texts_to_come(parts, trainer)
    node = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    for rank, size in ((world.rank, world.size), node):
        model.encode_ahead(texts[rank::size], is_shown=world.is_first)
        world.everyones(True, "conditions of prompts")


def _texts_to_come(parts: RunParts, trainer: Trainer) -> list[str]:
    """The different texts of the run in the order in which they come, at most ``_MOST_AHEAD``."""
    texts = dict.fromkeys([*([""] if trainer.model.has_two_branches else []), *texts_to_encode(parts.held_out)])
    all_of_them = len(texts.keys() | {*texts_to_encode(parts.prompts)})
    for iteration in range(trainer.num_iterations):
        if len(texts) >= min(_MOST_AHEAD, all_of_them):
            break
        texts |= dict.fromkeys(texts_to_encode(as_prompts(trainer.prompts.at(iteration).asked)))
    return list(texts)[:_MOST_AHEAD]


def _find_run(parts: RunParts, world: World) -> SameRun:
    return SameRun.find(parts.output, parts.config, resume=parts.resume, world=world)


def _load_rewards(parts: RunParts) -> Loaded:
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


def _say_what_to_know(parts: RunParts, run: SameRun, trainer: Trainer) -> None:
    """What a resumed run does otherwise than before, whether there is anything left to do, and what is judged."""
    if seen := set(parts.held_out_texts) & set(parts.texts):
        print(f"prompts.held_out shares {len(seen)} of its prompts with prompts.path: those are not unseen in training")
    if settings := started(trainer.model).settings:
        begun, adaptation = run.config["adaptation"]["start"], parts.config["adaptation"]
        own = adaptation["alpha"] / adaptation["rank"]
        print(
            f"training starts from adaptation.start={begun}: its rank {settings['rank']} and its layers take the place "
            f"of adaptation.rank and targets, and alpha / rank stays {own:g}"
        )
    for line in run.resumed(trainer.iteration):
        print(line)
    if trainer.iteration > 0 and trainer.is_over:
        print(
            f"the run in {run.directory.path} is at its end, after {trainer.iteration} iterations; raise "
            "train.iterations or train.max_minutes to train on"
        )


def _write_weights(parts: RunParts, trainer: Trainer, run: SameRun) -> None:
    if not run.world.is_first:
        return
    if trainer.model.has_lora:
        with trainer.ema.applied():
            trainer.model.save_lora(run.directory.lora)
        # the last of what the record says there is to open
        print(f"  {run.directory.lora}  the trained LoRA", flush=True)
        call = getattr(trainer.model, "diffusers_call", None)
        if call is not None:
            card = ModelCard(
                call=call,
                times=parts.algorithm.evaluation_grid(parts.evaluating.num_steps),
                prompt=parts.held_out_texts[0],
                config=run.config,
                iteration=trainer.iteration,
            )
            card.write(run.directory.lora, is_lora=True)
    if isinstance(trainer.proposal, ProposalLearner):
        save_proposal(trainer.proposal.network, run.directory.proposal)
