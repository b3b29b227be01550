"""Why a run ends: a line that names rank, host and cause, and what it takes to find it: tracebacks, stacks, a table."""

import sys
import threading
import traceback
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch.distributed as dist

from fastgrpo.distributed.standing import Standing, names, table
from fastgrpo.distributed.world import RankFailure

_MOST_CHARACTERS = 20_000


@dataclass(frozen=True, kw_only=True)
class Failure:
    """``is_echo``: raised because another rank did not answer, so that one is looked for.

    ``is_agreed``: all ranks raise it together.
    """

    culprits: tuple[int, ...]
    headline: str
    text: str
    is_echo: bool = False
    is_agreed: bool = False

    @property
    def values(self) -> dict[str, object]:
        """What JSON can hold."""
        return asdict(self) | {"culprits": list(self.culprits)}

    @classmethod
    def of_values(cls, values: Mapping[str, object]) -> "Failure":
        return cls(**(dict(values) | {"culprits": tuple(values["culprits"])}))  # type: ignore[arg-type]


def raised(error: BaseException, standing: Standing, agreed: tuple[type[BaseException], ...]) -> Failure:
    """A rank left by an exception; it is told by its first cause, of which the others may only have heard."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    first_line = (str(cause).splitlines() or [""])[0]
    headline = f"{standing.name} raised {type(cause).__name__}: {first_line} (iteration {standing.iteration})"
    # gloo's own errors are plain RuntimeErrors
    is_echo = isinstance(cause, RankFailure | dist.DistError) or "gloo" in str(cause)
    failure = Failure(culprits=(standing.rank,), headline=headline, text=traceback_of(error))
    return replace(failure, is_echo=is_echo, is_agreed=isinstance(error, agreed))


def died(gone: Sequence[Standing], everyone: Sequence[Standing]) -> Failure:
    """Processes that ended without a word."""
    return _blame(gone, f"{names(gone)} died, killed or by a crash outside Python, last {gone[0]}", everyone)


def silent(found: Sequence[Standing], everyone: Sequence[Standing], seconds: float) -> Failure:
    """Ranks that gave no sign of life for so long."""
    return _blame(found, f"{names(found)} gave no sign of life for {seconds:g} s, last {found[0]}", everyone)


def held_up(found: Sequence[Standing], everyone: Sequence[Standing], stacks: Mapping[int, str]) -> Failure:
    """Ranks that the others wait for, with the stacks of their main threads, of those that answered."""
    what = max(everyone, key=lambda standing: standing.num_exchanges).waiting_in
    headline = f"{names(found)} held up the others{f' in {what!r}' if what else ''}: {found[0]}"
    if len(found) == len(everyone):
        headline = f"an exchange failed in which all ranks took part, as far as is known: {found[0]}"
    texts = [f"{standing.name} is here:\n{stacks[standing.rank]}" for standing in found if standing.rank in stacks]
    dumb = [standing for standing in found if standing.rank not in stacks]
    if dumb:
        texts.append(f"no stack of {names(dumb)}: stopped, gone, cut off, or not asked since they are many\n")
    return _blame(found, headline, everyone, "".join(texts))


def lost_store(address: str, why: str) -> Failure:
    """What the ranks met at is no more, and with it all that they could have said."""
    headline = f"the store at {address}, held by the first rank or its launcher, {why}"
    return Failure(culprits=(), headline=headline, text="")


def speaker(ranks: Collection[int], failure: Failure) -> int:
    """Of the ranks of a machine the one that shows the text: one that is not at fault, where there is any."""
    return min(set(ranks) - set(failure.culprits) or ranks)


def traceback_of(error: BaseException) -> str:
    """The end of it, where it is very long."""
    return "".join(traceback.format_exception(error))[-_MOST_CHARACTERS:]


def main_thread_stack() -> str:
    """Where the main thread of this process is now, whichever thread asks."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return "".join(traceback.format_stack(frame)) if frame else "the main thread is over\n"


def _blame(culprits: Sequence[Standing], headline: str, everyone: Sequence[Standing], text: str = "") -> Failure:
    ranks = tuple(standing.rank for standing in culprits)
    return Failure(culprits=ranks, headline=headline, text=f"{text}where the ranks stood:\n{table(everyone)}\n")
