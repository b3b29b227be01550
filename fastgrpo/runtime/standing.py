"""Where each rank of a run stands, as its watcher tells the others, and whom a failure is put down to.

Ranks take part in the same exchanges in the same order.  So when some wait, the one they wait for has begun fewest
exchanges, and of several it is one that is not waiting itself.
"""

import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

_MOST_CHARACTERS = 20_000


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

    def __str__(self) -> str:
        waiting = f", waiting in {self.waiting_in!r} for {self.seconds:.0f} s" if self.waiting_in else ""
        return f"iteration {self.iteration}, {self.stage}{waiting}"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What ends a run: ``headline`` names rank, host and why in a line, ``text`` has tracebacks and stacks.

    ``is_echo``: it was raised because another rank did not answer, so that one is looked for.  ``is_agreed``: all
    ranks raise it together.
    """

    culprits: tuple[int, ...]
    headline: str
    text: str
    is_echo: bool = False
    is_agreed: bool = False

    @classmethod
    def of(cls, culprits: Sequence[Standing], headline: str, text: str) -> "Failure":
        return cls(culprits=tuple(standing.rank for standing in culprits), headline=headline, text=text)

    @property
    def values(self) -> dict[str, object]:
        """What JSON can hold."""
        return asdict(self) | {"culprits": list(self.culprits)}

    @classmethod
    def of_values(cls, values: Mapping[str, object]) -> "Failure":
        return cls(**(dict(values) | {"culprits": tuple(values["culprits"])}))  # type: ignore[arg-type]


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


def traceback_of(error: BaseException) -> str:
    """The end of it, where it is very long."""
    return "".join(traceback.format_exception(error))[-_MOST_CHARACTERS:]


def main_thread_stack() -> str:
    """Where the main thread of this process is now, whichever thread asks."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return "".join(traceback.format_stack(frame)) if frame else "the main thread is over\n"
