"""Where each rank of a run stands, as its watcher tells the others, and whom a failure is put down to.

Ranks take part in the same exchanges in the same order.  So when some wait, the one they wait for has begun fewest
exchanges, and of several it is one that is not waiting itself.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from fastgrpo.distributed.launch import machine_name, process_name
from fastgrpo.distributed.world import World
from fastgrpo.profiling.timing import running_stage


@dataclass(frozen=True, kw_only=True)
class Standing:
    """One rank: ``process`` is its name (``launch.process_name``), ``machine`` is equal where /proc is shared.

    ``num_exchanges`` were begun, the last of them ``seconds`` ago; in ``waiting_in``, if any, it still waits.
    """

    rank: int
    host: str
    process: str
    machine: str
    iteration: int
    stage: str
    waiting_in: str
    num_exchanges: int
    seconds: float

    @property
    def name(self) -> str:
        return f"rank {self.rank} on {self.host}"

    @property
    def process_id(self) -> int:
        return int(self.process.split()[1])

    def __str__(self) -> str:
        waiting = f", waiting in {self.waiting_in!r} for {self.seconds:.0f} s" if self.waiting_in else ""
        return f"iteration {self.iteration}, {self.stage}{waiting}"


class Whereabouts:
    """This rank's standing, whenever one asks."""

    def __init__(self, world: World) -> None:
        self._world, self._process, self._machine = world, process_name(os.getpid()), machine_name()
        # exchanges begun when they were last counted, and when that number was new
        self._num_exchanges, self._since = -1, 0.0

    def __call__(self, iteration: int) -> Standing:
        now, num_exchanges = time.monotonic(), self._world.num_exchanges
        if self._num_exchanges != num_exchanges:
            self._num_exchanges, self._since = num_exchanges, now
        return Standing(
            rank=self._world.rank,
            host=self._process.split()[0],
            process=self._process,
            machine=self._machine,
            iteration=iteration,
            stage=running_stage(),
            waiting_in=self._world.waiting_in,
            num_exchanges=num_exchanges,
            seconds=now - self._since,
        )


@dataclass
class Signs:
    """Which ranks have fallen silent.  Counted in looks, not by the clock: when the looking process has been stopped
    for a while, others are not dead."""

    ranks: Sequence[int]
    most_looks: float
    _last: dict[int, Standing] = field(default_factory=dict, init=False)
    _looks_without: dict[int, int] = field(default_factory=dict, init=False)

    def look(self, standings: Sequence[Standing]) -> list[Standing]:
        """Those that have not changed in so many looks; every sign differs, in its seconds if in nothing else."""
        for standing in standings:
            is_new = self._last.get(standing.rank) != standing
            self._looks_without[standing.rank] = 0 if is_new else self._looks_without[standing.rank] + 1
            self._last[standing.rank] = standing
        return [standing for standing in standings if self._looks_without[standing.rank] >= self.most_looks]


def suspects(standings: Sequence[Standing]) -> list[Standing]:
    """Those that the others wait for; all of them, where all wait in the same exchange."""
    fewest = min(standing.num_exchanges for standing in standings)
    behind = [standing for standing in standings if standing.num_exchanges == fewest]
    return [standing for standing in behind if not standing.waiting_in] or behind


def is_held_up(standings: Sequence[Standing], limit_seconds: float) -> bool:
    """Whether some rank began an exchange longer ago than the limit, and another has not begun it yet."""
    fewest = min(standing.num_exchanges for standing in standings)
    return any(standing.num_exchanges > fewest and standing.seconds > limit_seconds for standing in standings)


def table(standings: Sequence[Standing], most: int = 32) -> str:
    """A line a rank, those with fewest exchanges first; of very many ranks those."""
    ordered = sorted(standings, key=lambda standing: (standing.num_exchanges, bool(standing.waiting_in)))
    lines = [f"  {standing.name}: {standing}; {standing.num_exchanges} exchanges" for standing in ordered[:most]]
    return "\n".join(lines + [f"  and {len(ordered) - most} more"] * (len(ordered) > most))


def names(standings: Sequence[Standing], most: int = 4) -> str:
    """Ranks and hosts, of very many the first ones."""
    named = ", ".join(standing.name for standing in standings[:most])
    return named if len(standings) <= most else f"{named} and {len(standings) - most} more"
