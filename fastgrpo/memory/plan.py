"""How many samples run at a time, chosen from a device's memory and what one and two samples need of it.

    bytes(stage, n) = fixed + n * per_sample                from the peaks of one sample and of two
    fits(stage)     = the largest n with  bytes(stage, n) + held <= share * memory
    batch           = of fits / 2 < n <= fits, the one that computes the fewest rows in whole batches, then the largest

``held`` is what an iteration keeps beside a stage: images, trained steps, the optimizer's state, the average.
Checkpointing computes each forward pass twice (SD3.5-medium: 1.47 times the operations of an update), while smaller
batches compute what larger ones do: so it is on only where fewer than ``SMALL`` samples fit without it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from rich import box
from rich.table import Table

from fastgrpo.memory.batch_size import DoesNotFit
from fastgrpo.memory.device import Meter

TRAINING, SAMPLING, DECODING, REWARD = "training", "sampling", "decoding", "reward"
KEYS = {
    TRAINING: "runtime.micro_batch",
    SAMPLING: "runtime.sampling_batch",
    DECODING: "runtime.decode_batch",
    REWARD: "reward.scoring.micro_batch",
}
# the rest is for fragments, for kernels' own memory, and for rows that caches gain over a run
SHARE = 0.9
SMALL = 2
# of what is free: rewards run beside the rollout, whose batches need the rest
_REWARD_SHARE = 0.25

# stage by name -> a function that runs it with so many samples
Stages = Mapping[str, Callable[[int], object]]


@dataclass(frozen=True)
class Cost:
    """Bytes in use while a stage runs ``n`` samples: ``fixed + n * per_sample``."""

    fixed: int
    per_sample: int

    @classmethod
    def of(cls, peak_of_one: int, peak_of_two: int) -> "Cost":
        """The line through two peaks."""
        per_sample = max(1, peak_of_two - peak_of_one)
        return cls(fixed=peak_of_one - per_sample, per_sample=per_sample)

    def bytes(self, num_samples: int) -> int:
        """Of so many samples at a time."""
        return self.fixed + num_samples * self.per_sample

    def fitting(self, budget: int) -> int:
        """The most samples that fit into ``budget`` bytes, 0 if none does."""
        return max(0, (budget - self.fixed) // self.per_sample)


def measure(stages: Stages, meter: Meter) -> dict[str, Cost]:
    """What each stage costs.  Each runs once before, so that what stays of it, such as gradients, is in all costs."""
    for run in stages.values():
        meter.peak(partial(run, 1))
    return {name: Cost.of(meter.peak(partial(run, 1)), meter.peak(partial(run, 2))) for name, run in stages.items()}


@dataclass(frozen=True)
class Choice:
    """``batch`` of ``total`` samples at a time; ``fitting`` would fit, and ``beside`` bytes are in use beside them."""

    key: str
    cost: Cost
    total: int
    fitting: int
    beside: int

    @property
    def batch(self) -> int:
        return even_batch(self.total, self.fitting)

    @property
    def peak_bytes(self) -> int:
        """The most bytes that are expected to be in use."""
        return self.beside + self.cost.bytes(self.batch)


@dataclass(frozen=True)
class MemoryPlan:
    """The choice of each stage, by name, for a device with ``memory`` bytes."""

    choices: dict[str, Choice]
    checkpointing: bool
    held: int
    memory: int

    def batch(self, stage: str) -> int:
        """Samples at a time."""
        return self.choices[stage].batch

    @property
    def lacks_room(self) -> bool:
        """Whether the update is squeezed into fewer than ``SMALL`` samples, or does not fit at all."""
        training = self.choices[TRAINING]
        return training.fitting < min(SMALL, training.total)

    def check(self) -> None:
        """DoesNotFit, with the numbers, if there is a stage of which not even one sample fits."""
        for name, choice in self.choices.items():
            if choice.fitting < 1:
                raise DoesNotFit(
                    f"one sample of {name} needs {gib(choice.cost.bytes(1))} and an iteration keeps "
                    f"{gib(choice.beside)} beside it, but {SHARE:.0%} of the memory are "
                    f"{gib(int(SHARE * self.memory))}; lower model.resolution, or use model.dtype=bfloat16 or "
                    "adaptation.backup=host"
                )

    def table(self) -> Table:
        """The plan as a run shows it at its start, and doctor without a run."""
        switch = "on" if self.checkpointing else "off"
        table = Table(
            *("key", "fixed", "a sample", "fit", "batch", "peak"),
            box=box.SIMPLE,
            title=f"memory plan: {SHARE:.0%} of {gib(self.memory)}",
            caption=f"checkpointing {switch}; each peak includes {gib(self.held)} of samples and optimizer state",
        )
        for choice in self.choices.values():
            sizes = (choice.cost.fixed, choice.cost.per_sample)
            batch = f"{choice.batch} of {choice.total}"
            fit = "all" if choice.fitting >= choice.total else str(choice.fitting)
            table.add_row(choice.key, *map(gib, sizes), fit, batch, gib(choice.peak_bytes))
        return table


def plan_memory(
    costs: Mapping[str, Cost], totals: Mapping[str, int], *, held: int, memory: int, checkpointing: bool
) -> MemoryPlan:
    """The largest batches that fit.  ``totals`` are the samples that a stage has in all, of which batches are parts.

    Rewards come first: they run beside the rollout, so what they use is not there for sampling and decoding.  What is
    decoded is a batch of sampling.
    """
    budget, beside_rollout = int(SHARE * memory), held
    choices: dict[str, Choice] = {}
    for name in sorted(costs, key=(REWARD, TRAINING, SAMPLING, DECODING).index):
        cost, beside = costs[name], held if name in (REWARD, TRAINING) else beside_rollout
        free = budget - beside - cost.fixed
        fitting = cost.fitting(cost.fixed + int(_REWARD_SHARE * free) if name == REWARD else budget - beside)
        total = choices[SAMPLING].batch if name == DECODING else totals[name]
        choices[name] = Choice(KEYS[name], cost, total, fitting, beside)
        if name == REWARD:
            beside_rollout += choices[name].batch * cost.per_sample
    return MemoryPlan({name: choices[name] for name in costs}, checkpointing, held, memory)


def even_batch(total: int, fitting: int) -> int:
    """At most ``fitting`` of ``total`` samples at a time, so that the last batch is filled up with as few as can be."""
    limit = min(total, fitting)
    if limit < 1:
        return 0
    return min(range(limit // 2 + 1, limit + 1), key=lambda size: (-(-total // size) * size, -size))


def gib(num_bytes: int) -> str:
    """``18.27 GiB``, or MiB where that would be 0.0."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**28 else f"{num_bytes / 2**20:.1f} MiB"
