"""Where an algorithm's signal is chosen: the rollout that gives it, and the replay that learns from it."""

from collections.abc import Callable

from fastgrpo.algorithm.algorithm import Algorithm
from fastgrpo.image_replay import ImageReplay
from fastgrpo.memory.batch_size import BatchSize
from fastgrpo.models.adapter import FlowModel
from fastgrpo.old_policy import OldPolicy
from fastgrpo.replay import Replay
from fastgrpo.rollout import FindNoise, ImageRollout, Rollout, StepRollout, not_searched
from fastgrpo.sampler import Sampler
from fastgrpo.step_replay import StepReplay


def make_rollout(algorithm: Algorithm, sampler: Sampler, seed: int, find_noise: FindNoise = not_searched) -> Rollout:
    """The rollout that gives what the algorithm's objective learns from; ``find_noise`` of the first trained step."""
    if algorithm.learns_from_images:
        return ImageRollout(sampler=sampler)
    return StepRollout(
        sampler=sampler,
        dynamics=algorithm.dynamics,
        timesteps=algorithm.steps,
        seed=seed,
        keeps_means=algorithm.step_objective.needs_distance,
        find_noise=find_noise,
    )


def make_replay(
    algorithm: Algorithm, model: FlowModel, old_policy: OldPolicy, sampling: BatchSize, seed: int
) -> Replay:
    """The replay of what the algorithm's objective learns from; ``sampling`` is a batch without gradient."""
    if algorithm.learns_from_images:
        return ImageReplay(
            model=model,
            old_policy=old_policy,
            times=algorithm.times,
            objective=algorithm.image_objective,
            sampling=sampling,
            seed=seed,
        )
    if old_policy.lags:
        raise ValueError(
            f"train.old_policy_growth={old_policy.growth} makes rollouts of another policy than the "
            "trained one, and this algorithm's ratio must begin at 1; use 0, or an algorithm that learns from images"
        )
    return StepReplay(model=model, grid=algorithm.grid, dynamics=algorithm.dynamics, objective=algorithm.step_objective)


def rehearsal(algorithm: Algorithm) -> Callable[[FlowModel], Replay]:
    """A model -> the replay that shows the memory planner what a term takes."""
    one = BatchSize(value=1, key="runtime.sampling_batch")
    return lambda model: make_replay(algorithm, model, OldPolicy(model.trainable), one, seed=0)
