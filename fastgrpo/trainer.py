"""The loop: prompts -> conditions -> start noise -> rollout -> rewards -> advantages -> update -> checkpoint.

Every rank runs it on samples of its own; rewards and gradients are of all of them.
Letters: P prompts, G samples of a prompt, B samples of this rank, R rewards, C H W of a latent.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from signal import SIGINT

import torch
from torch import Tensor

from fastgrpo.algorithm.algorithm import Algorithm
from fastgrpo.algorithm.noise import rank_correlation
from fastgrpo.checkpoints.checkpoint import Checkpoint, TrainState
from fastgrpo.compile.blocks import num_compilations
from fastgrpo.distributed.signals import StopRequest
from fastgrpo.distributed.spread import Spread
from fastgrpo.distributed.world import RankFailure, World
from fastgrpo.ema import EMA
from fastgrpo.evaluation import Evaluation
from fastgrpo.health import Health, Preempted
from fastgrpo.memory.device import peak_bytes
from fastgrpo.memory.plan import MemoryPlan
from fastgrpo.models.adapter import FlowModel, encoded
from fastgrpo.old_policy import OldPolicy
from fastgrpo.on_device import on_device
from fastgrpo.profiling.profile import Step, unprofiled
from fastgrpo.profiling.timing import WAIT, StageTimer
from fastgrpo.prompts import PromptSource
from fastgrpo.proposal.learner import Learner, NothingLearned
from fastgrpo.records.evaluations import total
from fastgrpo.records.record import Recorder
from fastgrpo.retry import Made, Retry
from fastgrpo.rewards.reward import RewardError
from fastgrpo.rewards.weighted_sum import Rewards
from fastgrpo.rollout import Rollout
from fastgrpo.start_noise import StartNoise
from fastgrpo.types import Noise, Samples
from fastgrpo.types import Rewards as NamedRewards
from fastgrpo.update import Update, UpdateStats

STAGES = ("encode", "search", "rollout", "reward", "update")
# what ranks tell each other of their seconds
TOLD = ("iteration", *STAGES, *(WAIT + stage for stage in STAGES))


@dataclass(kw_only=True)
class Trainer:
    """One run: from its first iteration, or from its last checkpoint, to ``num_iterations`` or ``max_seconds``.

    plan: of its memory, where batches were planned.  is_stopped: asked after each iteration, as a signal would stop it.
    """

    prompts: PromptSource
    group_size: int
    model: FlowModel
    algorithm: Algorithm
    start_noise: StartNoise
    rollout: Rollout
    retry: Retry
    rewards: Rewards
    update: Update
    old_policy: OldPolicy
    ema: EMA
    evaluation: Evaluation
    evaluate_every: int
    checkpoint: Checkpoint
    keep_best: bool
    health: Health
    record: Recorder
    num_iterations: int
    max_seconds: float
    seed: int
    world: World = field(default_factory=World)
    proposal: Learner = field(default_factory=NothingLearned)
    plan: MemoryPlan | None = None
    profile: Callable[[Step], dict[str, float]] = unprofiled
    is_stopped: Callable[[], bool] = lambda: False
    iteration: int = field(default=0, init=False)
    seconds: float = field(default=0.0, init=False)
    # the largest weighted sum of an evaluation's scores so far, and after which iteration
    _best: tuple[float, int] | None = field(default=None, init=False)
    _checkpoint_seconds: float = field(default=0.0, init=False)
    _stop_request: StopRequest = field(default_factory=StopRequest, init=False)
    # a signal that came to any of the ranks
    _stop_signal: int = field(default=0, init=False)
    # an iteration's metrics while they wait for its evaluation
    _unrecorded: dict[str, float] = field(default_factory=dict, init=False)

    def step(self) -> dict[str, float]:
        """One iteration; its metrics."""
        timer, compiled = StageTimer(self.model.device), num_compilations()
        with timer("encode"):
            prompts = self.prompts.at(self.iteration)
            shares = self.update.shares(len(prompts) * self.group_size, self.iteration)
            spread = Spread.of_shares(shares, self.world.size)
            samples = Samples(prompts, self.group_size, spread.rows[self.world.rank], spread.most)
            conditions = encoded(self.model, samples.asked)
        with timer("search"):
            noise = self.start_noise(samples, self.iteration)
        with timer("rollout"), self.old_policy.applied():
            scores = self.rewards.begin(samples.asked)
            num_differentiated = self.update.num_differentiated(shares)
            trajectories = self.rollout(
                samples, conditions, noise, self.iteration, scores.add, num_differentiated=num_differentiated
            )
        with timer("reward"):
            rewards_BR = self.world.gather(scores.collect, spread, len(self.rewards.all), "rewards")
        with timer("search"), self.old_policy.applied():
            trajectories, rewards_BR, retried, attempts = self.retry(
                samples, spread, self.iteration, Made(trajectories, rewards_BR)
            )
        with timer("reward"):
            rewards = self.rewards.of_groups(rewards_BR, self.group_size)
            advantages_B = _of(samples, self.algorithm.advantage(rewards.learned_PG))
        with timer("update"):
            learned = (trajectories.trained, conditions, advantages_B, shares, trajectories.gradients)
            stats = self.update(*learned, iteration=self.iteration)
            self.old_policy.follow()
            self.ema.update()
            proposed = self.proposal.learn(samples, conditions, noise, advantages_B, rewards.total_PG)
        self.health(self.iteration, stats, trajectories, advantages_B)
        self.iteration += 1
        noted = trajectories.noted(noise)
        if (self.iteration - 1) % self.evaluate_every == 0:
            self.record.search(self.iteration, prompts.texts, replace(noted, scored=attempts or noted.scored), rewards)
        measured = self._measured(noted, rewards, stats, self._agree(timer.seconds()))
        # a change of size changes rewards too
        size = {} if prompts.resolution is None else prompts.resolution._asdict()
        return measured | retried | size | proposed | {"compilations": num_compilations() - compiled}

    def run(self) -> None:
        """Train to the end, evaluating and saving on the way; asked to stop, or if a reward fails, save and stop."""
        opened = self.record.open(self.num_iterations, self.iteration, self.max_seconds)
        with self._stop_request.heard(), self._saved_if_a_reward_fails(), opened:
            if self.iteration == 0:
                self.record.row(0, self._evaluate())
            while not self.is_over or self._unrecorded:
                self._unrecorded = self._unrecorded or self.profile(self.step)
                if self.iteration % self.evaluate_every == 0 or self.is_over:
                    self._unrecorded |= self._evaluate()
                # before the checkpoint: one that outlives a kill then never lacks the lines that lead to it
                self.record.row(self.iteration, self._unrecorded)
                self._unrecorded = {}
                is_due = self.iteration % self.checkpoint.every == 0 or self._best_iteration == self.iteration
                if is_due or self.is_over or self._stop_signal:
                    self._save()
                if self._stop_signal:
                    self.checkpoint.wait()
                    self.record.finish()
                    raise Preempted(self._stop_signal, self.iteration)
            self.checkpoint.wait()
            self.record.finish()

    def state(self) -> TrainState:
        """All that a resumed run needs; noise and prompts are functions of the seed and the iteration."""
        return TrainState(
            iteration=self.iteration,
            seconds=self.seconds,
            weights={name: weight.detach() for name, weight in self.model.trainable.items()},
            ema=self.ema.averages,
            old=self.old_policy.weights,
            optimizer=self.update.optimizer.state_dict(),
            model=self.model.fingerprint,
            extra={
                "ema_updates": self.ema.num_updates,
                "skipped_in_a_row": self.health.skipped_in_a_row,
                "proposal": self.proposal.values,
                "best": list(self._best) if self._best else [],
                # as text, since JSON has no NaN
                "unrecorded": {name: repr(value) for name, value in self._unrecorded.items()},
            },
            proposal=self.proposal.tensors,
        )

    def resume(self) -> None:
        """Go on from the newest complete checkpoint, or begin where there is none."""
        path = self.checkpoint.latest()
        if path is None:
            self.record.truncate_to(-1, -1)
            return
        state = self.checkpoint.load_matching(path, self.state())
        self.iteration, self.seconds = state.iteration, state.seconds
        with torch.no_grad():
            for name, weight in self.model.trainable.items():
                weight.copy_(state.weights[name])
        self.ema.load(state.ema, state.extra["ema_updates"])
        self.old_policy.load(state.old, state.iteration)
        self.update.optimizer.load_state_dict(state.optimizer)
        self.proposal.load(state.proposal)
        for group in self.update.optimizer.param_groups:
            # update relies on it, and a checkpoint may be older
            group["fused"] = True
        self.health.skipped_in_a_row = state.extra["skipped_in_a_row"]
        value, iteration = state.extra.get("best") or (-math.inf, 0)
        self._best = (value, iteration) if value > -math.inf else None
        self._unrecorded = {name: float(value) for name, value in state.extra.get("unrecorded", {}).items()}
        self.record.truncate_to(self.iteration - bool(self._unrecorded), self.iteration)

    def _measured(
        self, noise: Noise, rewards: NamedRewards, stats: UpdateStats, seconds: Mapping[str, float]
    ) -> dict[str, float]:
        """The iteration's metrics; their meaning is in ``metrics.METRICS``."""
        self.seconds += seconds["iteration"]
        num_images = rewards.total_PG.numel()
        std_P = rewards.total_PG.std(dim=1, correction=0)
        # read at once: each reading waits for the device
        means = {
            **{f"reward/{name}": reward_PG.mean() for name, reward_PG in rewards.named.items()},
            "reward/total": rewards.total_PG.mean(),
            "reward/group_std": std_P.mean(),
            "zero_variance_groups": (std_P == 0).float().mean(),
        }
        if noise.estimates_PG is not None:
            noise.metrics["search/rank_correlation"] = rank_correlation(noise.estimates_PG, rewards.total_PG)
        return {
            "images": self.iteration * num_images,
            "seconds": self.seconds,
            **dict(zip(means, torch.stack(list(means.values())).tolist(), strict=True)),
            **stats.metrics,
            **noise.metrics,
            "images_per_second": num_images / seconds["iteration"],
            **{f"seconds/{stage}": seconds[stage] for stage in ("iteration", *STAGES)},
            "seconds/wait": sum(value for stage, value in seconds.items() if stage.startswith(WAIT)),
            "seconds/checkpoint": self._take_checkpoint_seconds(),
            "peak_bytes": peak_bytes(self.model.device),
        }

    def _agree(self, seconds: Mapping[str, float]) -> Mapping[str, float]:
        """Tell the other ranks how long this one took, and whether it was asked to stop; the first one's seconds."""
        told = [*(seconds.get(name, 0.0) for name in TOLD), self._stop_request.number or SIGINT * self.is_stopped()]
        table = self.world.table(torch.tensor(told, device=self.world.device, dtype=torch.float64), "seconds")
        *seconds_R, signals_R = table.T.tolist()
        of = dict(zip(TOLD, seconds_R, strict=True))
        self._stop_signal = int(max(signals_R))
        own = {stage: [a - b for a, b in zip(of[stage], of[WAIT + stage], strict=True)] for stage in STAGES}
        waited_R = [sum(waits) for waits in zip(*(of[WAIT + stage] for stage in STAGES), strict=True)]
        self.record.ranks(self.iteration, own, waited_R)
        return {name: seconds_R[0] for name, seconds_R in of.items()}

    def _evaluate(self) -> dict[str, float]:
        timer = StageTimer(self.model.device)
        with timer("evaluate"), self.ema.applied():
            result = self.evaluation()
        self.record.evaluation(self.iteration, result)
        scores = {f"eval/{name}": mean for name, mean in result.means.items()}
        value = total(scores, self.rewards.weights)
        if value is not None and (self._best is None or value > self._best[0]):
            self._best = value, self.iteration
        return {
            "seconds": self.seconds,
            **scores,
            "seconds/evaluate": timer.seconds()["evaluate"],
        }

    def _save(self) -> None:
        timer = StageTimer(self.model.device)
        with timer("checkpoint"):
            self.checkpoint.save(self.state(), self._best_iteration)
        self._checkpoint_seconds = timer.seconds()["checkpoint"]

    @property
    def _best_iteration(self) -> int | None:
        """After which the best evaluation was, where its checkpoint is to be kept."""
        return self._best[1] if self._best and self.keep_best else None

    def _take_checkpoint_seconds(self) -> float:
        taken, self._checkpoint_seconds = self._checkpoint_seconds, 0.0
        return taken

    @property
    def is_over(self) -> bool:
        """Whether there is no iteration left, or no time."""
        return self.iteration >= self.num_iterations or self.seconds >= self.max_seconds

    @contextmanager
    def _saved_if_a_reward_fails(self) -> Iterator[None]:
        """Rewards fail before the update that would learn from them, so the state is that of the last iteration."""
        try:
            yield
        except (RewardError, RankFailure) as error:
            # all ranks are here, whichever of them it was
            if self.iteration == 0:
                raise
            self._save()
            self.checkpoint.wait()
            raise RewardError(f"{error}; iteration {self.iteration} is saved, go on with resume=true") from error


def _of(samples: Samples, values_PG: Tensor) -> Tensor:
    """The values of this rank's samples."""
    return values_PG.flatten()[on_device(samples.rows, values_PG.device)]
