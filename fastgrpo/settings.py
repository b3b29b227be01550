"""The plain groups of a config, as the dataclasses that the rest of the package is handed.

Each field is a key; ``__post_init__`` refuses a value that cannot work, with the key, the value and the remedy, before
anything is loaded or written.
"""

from dataclasses import dataclass, replace

from fastgrpo.learning_rate import LearningRate

# torch.manual_seed is given seed * 1_000_003 + iteration, which must fit 64 bits
MAX_SEED = 2**43


@dataclass(frozen=True, kw_only=True)
class Training:
    """``train``: how long, on how many samples, and with which optimizer."""

    iterations: int
    max_minutes: float
    prompts_per_iteration: int
    group_size: int
    optimizer_steps: int
    updates: int | None
    max_drift: float
    old_policy_growth: float
    old_policy_limit: float
    gradients: str
    learning_rate: float
    warmup_iterations: int
    decay_share: float
    decay_to: float
    weight_decay: float
    max_grad_norm: float
    ema_decay: float
    ema_share: float

    def __post_init__(self) -> None:
        at_least("train.iterations", self.iterations, 1)
        above("train.max_minutes", self.max_minutes, 0)
        at_least("train.prompts_per_iteration", self.prompts_per_iteration, 1)
        if self.group_size < 2:
            raise ValueError(
                f"train.group_size must be at least 2, got {self.group_size}: an advantage compares the samples of a "
                "group, and alone in its group a sample has none"
            )
        at_least("train.optimizer_steps", self.optimizer_steps, 1)
        if self.updates is not None:
            if isinstance(self.updates, bool) or not isinstance(self.updates, int):
                raise ValueError(
                    f"train.updates must be a whole number, or null for the algorithm's usual one, got {self.updates}"
                )
            at_least("train.updates", self.updates, 1)
        above("train.max_drift", self.max_drift, 0, "use inf for no bound")
        at_least("train.old_policy_growth", self.old_policy_growth, 0)
        if not 0 <= self.old_policy_limit < 1:
            raise ValueError(
                f"train.old_policy_limit must lie in [0, 1), got {self.old_policy_limit}: with 1 the old policy stays "
                "where it is"
            )
        one_of("train.gradients", self.gradients, ("replay", "reweight"))
        above("train.learning_rate", self.learning_rate, 0)
        if self.learning_rate > 1:
            raise ValueError(
                f"train.learning_rate must be at most 1, got {self.learning_rate:g}; 1e-4 to 1e-3 suits most LoRA runs"
            )
        at_least("train.warmup_iterations", self.warmup_iterations, 0)
        if not 0 <= self.decay_share <= 1:
            raise ValueError(
                f"train.decay_share must lie in [0, 1], got {self.decay_share}: the share of train.iterations in which "
                "the learning rate falls; 0 keeps it"
            )
        if not 0 <= self.decay_to <= 1:
            raise ValueError(
                f"train.decay_to must lie in [0, 1], got {self.decay_to}: the share of the learning rate that is left "
                "at the end"
            )
        at_least("train.weight_decay", self.weight_decay, 0)
        above("train.max_grad_norm", self.max_grad_norm, 0, "use inf for none")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"train.ema_decay must lie in [0, 1), got {self.ema_decay}; 0 evaluates the weights")
        if not 0 <= self.ema_share < 1:
            raise ValueError(
                f"train.ema_share must lie in [0, 1), got {self.ema_share}: the share of all iterations so far that "
                "the average is of; 0 leaves it to train.ema_decay"
            )

    def for_updates(self, usual: int) -> "Training":
        """The same with a number of updates, the ``usual`` one where none was given."""
        return self if self.updates else replace(self, updates=usual)

    @property
    def num_updates(self) -> int:
        """Of an iteration."""
        assert self.updates is not None, "it is the algorithm's, until it is known"
        return self.updates

    @property
    def learning_rates(self) -> LearningRate:
        """That of each iteration."""
        return LearningRate(
            peak=self.learning_rate,
            num_iterations=self.iterations,
            warmup_iterations=self.warmup_iterations,
            decay_iterations=round(self.decay_share * self.iterations),
            decay_to=self.decay_to,
        )

    @property
    def num_samples(self) -> int:
        """Images of an iteration, over all ranks."""
        return self.prompts_per_iteration * self.group_size

    @property
    def reweights(self) -> bool:
        """Whether the rollout takes the gradients of the first optimizer step."""
        return self.gradients == "reweight"


@dataclass(frozen=True, kw_only=True)
class Evaluating:
    """``evaluate``: when, how many images of each held-out prompt, and in how many steps."""

    images_per_prompt: int
    num_steps: int
    every: int = 1

    def __post_init__(self) -> None:
        at_least("evaluate.every", self.every, 1)
        at_least("evaluate.images_per_prompt", self.images_per_prompt, 1)
        at_least("evaluate.num_steps", self.num_steps, 1)


@dataclass(frozen=True, kw_only=True)
class Saving:
    """``checkpoint``: each ``every`` iterations, of which the last ``keep`` stay, and that of the best evaluation."""

    every: int
    keep: int
    keep_best: bool
    asynchronous: bool

    def __post_init__(self) -> None:
        at_least("checkpoint.every", self.every, 1)
        at_least("checkpoint.keep", self.keep, 1)


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """``distributed``: how ranks wait for each other, and how many only score."""

    timeout_seconds: float
    beat_seconds: float
    dead_after_seconds: float
    reward_ranks: int

    def __post_init__(self) -> None:
        above("distributed.timeout_seconds", self.timeout_seconds, 0)
        above("distributed.beat_seconds", self.beat_seconds, 0)
        if not self.dead_after_seconds > self.beat_seconds:
            raise ValueError(
                f"distributed.dead_after_seconds must be more than distributed.beat_seconds={self.beat_seconds:g}, got "
                f"{self.dead_after_seconds:g}: every rank would be held for dead between two signs of life"
            )
        at_least("distributed.reward_ranks", self.reward_ranks, 0)


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """``runtime``: where and in what portions; none of it changes the recipe.  Sizes of 0 are still to be chosen."""

    device: str
    micro_batch: int
    sampling_batch: int
    decode_batch: int
    checkpointing: bool
    attention: str
    profile: bool
    threads: int
    deterministic: bool

    def __post_init__(self) -> None:
        kind, _, number = self.device.partition(":")
        if kind not in ("auto", "cpu", "cuda") or (number and not (kind == "cuda" and number.isdecimal())):
            raise ValueError(f"runtime.device must be auto, cpu, cuda or cuda:N, got {self.device!r}")
        for key in ("micro_batch", "sampling_batch", "decode_batch", "threads"):
            at_least(f"runtime.{key}", getattr(self, key), 0)


def check_seed(seed: int) -> None:
    """ValueError for a seed that torch and NumPy do not both take."""
    if not 0 <= seed < MAX_SEED:
        raise ValueError(f"seed must lie in 0 to {MAX_SEED - 1}, got {seed}")


def at_least(key: str, value: float, least: float) -> None:
    """ValueError for less, and for a number that is none."""
    # written so that nan is refused too
    if not value >= least:
        raise ValueError(f"{key} must be at least {least:g}, got {value}")


def above(key: str, value: float, limit: float, remedy: str = "") -> None:
    """ValueError unless the value is more."""
    if not value > limit:
        wanted = "positive" if limit == 0 else f"more than {limit:g}"
        raise ValueError(f"{key} must be {wanted}, got {value}" + (f"; {remedy}" if remedy else ""))


def one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
    """ValueError for a value that is none of the choices."""
    if value not in choices:
        raise ValueError(f"{key} must be {' or '.join(choices)}, got {value!r}")
