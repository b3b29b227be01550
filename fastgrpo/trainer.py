"""The loop: prompts -> conditions -> start noise -> rollout -> rewards -> advantages -> update -> checkpoint.

Letters: P prompts, G samples of a prompt, B = P * G, K candidates of a noise search, C H W of a latent.
"""

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

import safetensors.torch
import torch
from torch import Tensor

from fastgrpo.algorithm.algorithm import Algorithm
from fastgrpo.algorithm.noise import rank_correlation
from fastgrpo.checkpoint import Checkpoint, TrainState
from fastgrpo.evaluate import Evaluation
from fastgrpo.metrics import Metrics
from fastgrpo.models.adapter import FlowModel
from fastgrpo.prompts import PromptSource
from fastgrpo.records.progress import Progress
from fastgrpo.records.run_directory import RunDirectory
from fastgrpo.rewards.reward import RewardError
from fastgrpo.rewards.weighted_sum import Rewards
from fastgrpo.rollout import Rollout
from fastgrpo.runtime.block_compile import num_compilations
from fastgrpo.runtime.ema import EMA
from fastgrpo.runtime.memory import peak_bytes
from fastgrpo.runtime.profile import Step, unprofiled
from fastgrpo.runtime.timing import StageTimer
from fastgrpo.start_noise import StartNoise
from fastgrpo.types import Noise, Trajectories
from fastgrpo.types import Rewards as NamedRewards
from fastgrpo.update import Update, UpdateStats

# float32 replays are exact and bfloat16 ones nearly: beyond this the update learns from another policy's samples
MAX_RATIO_DEVIATION = 1e-2
MAX_SKIPPED_IN_A_ROW = 3


class TrainingError(RuntimeError):
    """A run that must not go on; the message says what happened, what was saved and what to try."""


@dataclass(kw_only=True)
class Trainer:
    """One run: from its first iteration, or from its last checkpoint, to ``num_iterations`` or ``max_seconds``."""

    prompts: PromptSource
    group_size: int
    model: FlowModel
    algorithm: Algorithm
    start_noise: StartNoise
    rollout: Rollout
    rewards: Rewards
    update: Update
    ema: EMA
    evaluation: Evaluation
    evaluate_every: int
    checkpoint: Checkpoint
    directory: RunDirectory
    metrics: Metrics
    num_iterations: int
    max_seconds: float
    seed: int
    profile: Callable[[Step], dict[str, float]] = unprofiled
    iteration: int = field(default=0, init=False)
    seconds: float = field(default=0.0, init=False)
    _skipped_in_a_row: int = field(default=0, init=False)
    _checkpoint_seconds: float = field(default=0.0, init=False)
    _stop_signal: int = field(default=0, init=False)
    # an iteration's metrics while they wait for its evaluation
    _unrecorded: dict[str, float] = field(default_factory=dict, init=False)

    def step(self) -> dict[str, float]:
        """One iteration; its metrics."""
        timer, compiled = StageTimer(self.model.device), num_compilations()
        with timer("encode"):
            prompts = self.prompts.at(self.iteration)
            conditions = self.model.encode(prompts.texts)
        with timer("search"):
            noise = self.start_noise(prompts, conditions, self.iteration)
        with timer("rollout"):
            scores = self.rewards.begin(prompts.texts, self.group_size)
            trajectories = self.rollout(
                prompts,
                conditions,
                noise.start_BCHW,
                self._trained_steps(),
                scores.add,
                is_shared=noise.is_shared,
                differentiated=self.update.differentiated(len(noise.start_BCHW), self.iteration),
            )
        with timer("reward"):
            rewards = scores.collect()
            advantages_PG = self.algorithm.advantage(rewards.learned_PG)
        with timer("update"):
            samples = conditions.repeat(self.group_size)
            stats = self.update(
                trajectories.trained, samples, advantages_PG.flatten(), self.iteration, trajectories.gradients
            )
            self.ema.update()
        self._check(stats, trajectories, advantages_PG)
        self.iteration += 1
        measured = self._measured(noise, rewards, stats, timer.seconds())
        return measured | {"compilations": num_compilations() - compiled}

    def run(self) -> None:
        """Train to the end, evaluating and saving on the way; on SIGTERM, or if a reward fails, save and stop."""
        progress = Progress(
            self.num_iterations,
            first=self.iteration,
            max_seconds=self.max_seconds,
            num_compilations=num_compilations,
        )
        with self._stopped_by_sigterm(), self._saved_if_a_reward_fails(), self.metrics, progress:
            if self.iteration == 0:
                self._record(self._evaluate(), progress)
            while not self._is_over() or self._unrecorded:
                self._unrecorded = self._unrecorded or self.profile(self.step)
                if self.iteration % self.evaluate_every == 0 or self._is_over():
                    self._unrecorded |= self._evaluate()
                self._record(self._unrecorded, progress)
                self._unrecorded = {}
                if self.iteration % self.checkpoint.every == 0 or self._is_over() or self._stop_signal:
                    self._save()
                if self._stop_signal:
                    raise TrainingError(
                        f"stopped by signal {self._stop_signal} after iteration {self.iteration}, which is saved; "
                        "go on with resume=true"
                    )
            self.metrics.finish()

    def state(self) -> TrainState:
        """All that a resumed run needs; noise and prompts are functions of the seed and the iteration."""
        return TrainState(
            iteration=self.iteration,
            seconds=self.seconds,
            weights={name: weight.detach() for name, weight in self.model.trainable.items()},
            ema=self.ema.averages,
            optimizer=self.update.optimizer.state_dict(),
            model=self.model.fingerprint,
            extra={
                "ema_updates": self.ema.num_updates,
                "skipped_in_a_row": self._skipped_in_a_row,
                # as text, since JSON has no NaN
                "unrecorded": {name: repr(value) for name, value in self._unrecorded.items()},
            },
        )

    def resume(self) -> None:
        """Go on from the newest complete checkpoint, or begin where there is none."""
        path = self.checkpoint.latest()
        if path is None:
            self.metrics.truncate_to(-1)
            return
        state = self.checkpoint.load_matching(path, self.state())
        self.iteration, self.seconds = state.iteration, state.seconds
        with torch.no_grad():
            for name, weight in self.model.trainable.items():
                weight.copy_(state.weights[name])
        self.ema.load(state.ema, state.extra["ema_updates"])
        self.update.optimizer.load_state_dict(state.optimizer)
        for group in self.update.optimizer.param_groups:
            # update relies on it, and a checkpoint may be older
            group["fused"] = True
        self._skipped_in_a_row = state.extra["skipped_in_a_row"]
        self._unrecorded = {name: float(value) for name, value in state.extra.get("unrecorded", {}).items()}
        self.metrics.truncate_to(self.iteration - bool(self._unrecorded))

    def _trained_steps(self) -> tuple[int, ...]:
        return self.algorithm.timesteps(len(self.algorithm.grid) - 1, self.iteration, self.seed)

    def _measured(
        self, noise: Noise, rewards: NamedRewards, stats: UpdateStats, seconds: Mapping[str, float]
    ) -> dict[str, float]:
        """The iteration's metrics; their meaning is in ``metrics.METRICS``."""
        self.seconds += seconds["iteration"]
        num_images = rewards.total_PG.numel()
        std_P = rewards.total_PG.std(dim=1, correction=0)
        if noise.estimates_PG is not None:
            noise.metrics["search/rank_correlation"] = rank_correlation(noise.estimates_PG, rewards.total_PG)
        return {
            "images": self.iteration * num_images,
            "seconds": self.seconds,
            **{f"reward/{name}": reward_PG.mean().item() for name, reward_PG in rewards.named.items()},
            "reward/total": rewards.total_PG.mean().item(),
            "reward/group_std": std_P.mean().item(),
            "zero_variance_groups": (std_P == 0).float().mean().item(),
            # without a penalty the reference is not run, so there is no KL to log
            **{name: value for name, value in vars(stats).items() if name != "kl" or self.algorithm.objective.kl_coef},
            **noise.metrics,
            "images_per_second": num_images / seconds["iteration"],
            **{f"seconds/{stage}": value for stage, value in seconds.items()},
            "seconds/checkpoint": self._take_checkpoint_seconds(),
            "peak_bytes": peak_bytes(self.model.device),
        }

    def _check(self, stats: UpdateStats, trajectories: Trajectories, advantages_PG: Tensor) -> None:
        """Stop a run whose ratio or gradients are broken; the batch at fault is saved for study."""
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if stats.skipped_steps else 0
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            why = (
                f"{self._skipped_in_a_row} iterations in a row had gradients that are not finite; "
                "lower train.learning_rate"
            )
        elif not stats.skipped_steps and stats.ratio_deviation > MAX_RATIO_DEVIATION:
            why = (
                f"ratio_deviation is {stats.ratio_deviation:.2g} before the first optimizer step, where the ratio must "
                "be 1: rollout and update disagree; run fastgrpo doctor, or use model.dtype=float32"
            )
        else:
            return
        path = self.directory.path / "failed_batch.safetensors"
        kept = vars(trajectories) | vars(trajectories.trained) | {"advantages_PG": advantages_PG}
        tensors = {name: value for name, value in kept.items() if isinstance(value, Tensor)}
        safetensors.torch.save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, path)
        raise TrainingError(f"iteration {self.iteration}: {why}; its samples are in {path}")

    def _evaluate(self) -> dict[str, float]:
        timer = StageTimer(self.model.device)
        with timer("evaluate"), self.ema.applied():
            result = self.evaluation()
        self.metrics.evaluation_grid(self.iteration, result.images_BCHW, result.texts, result.verified)
        return {
            "seconds": self.seconds,
            **{f"eval/{name}": mean for name, mean in result.means.items()},
            "seconds/evaluate": timer.seconds()["evaluate"],
        }

    def _record(self, values: Mapping[str, float], progress: Progress) -> None:
        # before the checkpoint: one that outlives a kill then never lacks the lines that lead to it
        self.metrics.log(self.iteration, values)
        progress.update(self.iteration, values)

    def _save(self) -> None:
        timer = StageTimer(self.model.device)
        with timer("checkpoint"):
            self.checkpoint.save(self.state())
        self._checkpoint_seconds = timer.seconds()["checkpoint"]

    def _take_checkpoint_seconds(self) -> float:
        taken, self._checkpoint_seconds = self._checkpoint_seconds, 0.0
        return taken

    def _is_over(self) -> bool:
        return self.iteration >= self.num_iterations or self.seconds >= self.max_seconds

    @contextmanager
    def _saved_if_a_reward_fails(self) -> Iterator[None]:
        """Rewards fail before the update that would learn from them, so the state is that of the last iteration."""
        try:
            yield
        except RewardError as error:
            if self.iteration == 0:
                raise
            self._save()
            raise RewardError(f"{error}; iteration {self.iteration} is saved, go on with resume=true") from error

    @contextmanager
    def _stopped_by_sigterm(self) -> Iterator[None]:
        def stop(signal_number: int, _: FrameType | None) -> None:
            self._stop_signal = signal_number

        before = signal.signal(signal.SIGTERM, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
