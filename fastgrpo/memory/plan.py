"""How many samples run at a time, chosen from a device's memory and what two and three samples need of it.

    bytes(stage, n) = fixed + n * per_sample                from the peaks of two samples and of three
    fits(stage)     = the largest n with  bytes(stage, n) + held <= share * memory
    batch           = of fits / 2 < n <= fits, the one that computes the fewest rows in whole batches, then the largest

``held`` is what an iteration keeps beside a stage: images, conditions, trained steps, the optimizer's state, the
average.  CUDA graphs keep the memory of a batch of sampling beside all other stages.  Where ``enough`` samples keep the
device busy, batches of sampling are no larger, unless more rows would be computed: rewards begin with the first one.
Checkpointing computes each forward pass twice (SD3.5-medium: 1.47 times the operations of an update), while smaller
batches compute what larger ones do: so it is on only where fewer than ``SMALL`` samples fit without it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from rich import box
from rich.table import Table

from fastgrpo.memory.batch_size import DoesNotFit
from fastgrpo.memory.device import Meter
from fastgrpo.out_of_memory import is_out_of_memory, release

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
# of samples whose peaks make a line.  One alone is no example: as much of it is contiguous as it is, and not copied
_FEW = (3, 2, 1)
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
    def of(cls, peak: int, peak_of_one_more: int, num_samples: int = 1) -> "Cost":
        """The line through the peaks of ``num_samples`` and of one more."""
        per_sample = max(1, peak_of_one_more - peak)
        return cls(fixed=peak - num_samples * per_sample, per_sample=per_sample)

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
    return {name: _measured(run, meter) for name, run in stages.items()}


def _measured(run: Callable[[int], object], meter: Meter) -> Cost:
    """The cost of one stage, from the most samples of a few that fit."""
    for more, few in pairwise(_FEW):
        try:
            return Cost.of(meter.peak(partial(run, few)), meter.peak(partial(run, more)), few)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            release(error)
    # one fits, and two do not
    return Cost(fixed=0, per_sample=meter.peak(partial(run, 1)))


@dataclass(frozen=True)
class Choice:
    """``batch`` of ``total`` samples at a time; ``fitting`` would fit, and ``beside`` bytes are in use beside them.

    enough: samples at a time that keep the device busy; None is as many as there are.
    """

    key: str
    cost: Cost
    total: int
    fitting: int
    beside: int
    enough: int | None = None

    @property
    def batch(self) -> int:
        return even_batch(self.total, self.fitting, self.enough)

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
    def peak_bytes(self) -> int:
        """The most bytes that are expected to be in use in an iteration."""
        return max(choice.peak_bytes for choice in self.choices.values())

    @property
    def lacks_room(self) -> bool:
        """Whether the update is squeezed into fewer than ``SMALL`` samples, or does not fit at all."""
        training = self.choices[TRAINING]
        return training.fitting < min(SMALL, training.total)

    def check(self, remedy: str = "lower model.resolution, or use model.dtype=bfloat16") -> None:
        """DoesNotFit, with the numbers, if there is a stage of which not even one sample fits."""
        for name, choice in self.choices.items():
            if choice.fitting < 1:
                raise DoesNotFit(
                    f"one sample of {name} needs {gib(choice.cost.bytes(1))} and an iteration keeps "
                    f"{gib(choice.beside)} beside it, but {SHARE:.0%} of the memory are "
                    f"{gib(int(SHARE * self.memory))}; {remedy}"
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
    costs: Mapping[str, Cost],
    totals: Mapping[str, int],
    *,
    held: int,
    memory: int,
    checkpointing: bool,
    enough: int | None = None,
    most_decoded: int | None = None,
    keeps_sampling: bool = False,
) -> MemoryPlan:
    """The largest batches that fit.  ``totals`` are the samples that a stage has in all, of which batches are parts.

    Rewards come first: they run beside the rollout, so what they use is not there for sampling and decoding.  What is
    decoded is a batch of sampling.
    enough: of sampling.  most_decoded: at a time.  keeps_sampling: whether what a batch of sampling takes stays in use,
    as by CUDA graphs.
    """
    budget, scored, kept = int(SHARE * memory), 0, 0
    choices: dict[str, Choice] = {}
    for name in sorted(costs, key=(REWARD, SAMPLING, DECODING, TRAINING).index):
        cost, beside = costs[name], held + (scored if name in (SAMPLING, DECODING) else 0) + kept
        free = budget - beside - cost.fixed
        fitting = cost.fitting(cost.fixed + int(_REWARD_SHARE * free) if name == REWARD else budget - beside)
        if name == DECODING and most_decoded is not None:
            fitting = min(fitting, most_decoded)
        total = choices[SAMPLING].batch if name == DECODING else totals[name]
        choices[name] = Choice(KEYS[name], cost, total, fitting, beside, enough if name == SAMPLING else None)
        used = choices[name].batch * cost.per_sample
        if name == REWARD:
            scored = used
        elif name == SAMPLING and keeps_sampling:
            kept = used
    return MemoryPlan({name: choices[name] for name in costs}, checkpointing, held, memory)


def even_batch(total: int, fitting: int, enough: int | None = None) -> int:
    """At most ``fitting`` of ``total`` samples at a time, so that the last batch is filled up with as few as can be.

    At most ``enough`` where that fills up no more.
    """
    limit = min(total, fitting)
    if limit < 1:
        return 0

    def rows(size: int) -> int:
        return -(-total // size) * size

    def evenest(limit: int) -> int:
        return min(range(limit // 2 + 1, limit + 1), key=lambda size: (rows(size), -size))

    size = evenest(limit)
    smaller = size if enough is None else evenest(min(limit, enough))
    return smaller if rows(smaller) <= rows(size) else size


def gib(num_bytes: int) -> str:
    """``18.27 GiB``, or MiB where that would be 0.0."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**28 else f"{num_bytes / 2**20:.1f} MiB"
