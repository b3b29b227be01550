"""A config -> its parts -> a trainer -> a run, from its first iteration or its last checkpoint to its end."""

import os
import shlex
from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig

from fastgrpo.assembly import assemble, find_run, load_rewards
from fastgrpo.checkpoints.checkpoint import CheckpointError
from fastgrpo.checkpoints.same_run import SameRun
from fastgrpo.distributed.watch import Watch
from fastgrpo.distributed.world import RankFailure, leave_world
from fastgrpo.given import NOTHING, Given
from fastgrpo.health import Preempted, TrainingError
from fastgrpo.memory.device import device_of
from fastgrpo.models.adapter import started
from fastgrpo.own_code.named import to_name_again
from fastgrpo.parts import RunParts
from fastgrpo.prompts import texts_to_encode
from fastgrpo.proposal.files import save_proposal
from fastgrpo.proposal.learner import ProposalLearner
from fastgrpo.records.model_card import ModelCard
from fastgrpo.rewards.ranks import ScoringRank, take_part
from fastgrpo.rewards.reward import RewardError
from fastgrpo.trainer import Trainer
from fastgrpo.types import as_prompts

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
        part.serve(lambda: load_rewards(parts))
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
        run = find_run(parts, world)
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
