"""When a rank dies, raises or hangs, every rank says which one and why, and ends: nobody waits for a timeout.

Each rank has two threads.  One writes a sign of life into the store that the ranks met at (``notices.py``) and reads
there whether the run has failed; that of the first rank reads the signs of all ranks, since all reading all would be
ranks**2 requests.  The other looks at the processes of its own machine, and at the first thread, which a frozen store
blocks.  What they see:

    raised    what a rank publishes of itself when an exception leaves the watched block
    gone      a process of this machine is no more: killed, or crashed in C
    silent    no sign of life for ``dead_after_seconds``: a stopped process, a frozen machine, a cut network
    hung      a rank has not begun an exchange that others began long ago: its stack is asked for, and shown

A rank that computes for long is healthy as long as its threads get their turn, as in compilation and in rollouts.
"""

import os
import select
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from types import TracebackType

from fastgrpo.distributed.failure import (
    Failure,
    died,
    held_up,
    lost_store,
    main_thread_stack,
    raised,
    silent,
    speaker,
    traceback_of,
)
from fastgrpo.distributed.launch import process_name
from fastgrpo.distributed.notices import Notices
from fastgrpo.distributed.standing import Signs, Standing, Whereabouts, is_held_up, suspects
from fastgrpo.distributed.world import World

FAILED = 1
# of the timeout of exchanges: it must not come first, since some backends end the process then without a word
_BEFORE_TIMEOUT = 0.9
_CONNECT_SECONDS = 10.0
_MOST_STACKS = 4


@dataclass(kw_only=True, eq=False)
class Watch:
    """A context around all that ranks do together, entered and left by all; for a world of one rank it does nothing.

    ``timeout_seconds`` is that of the exchanges.  ``agreed`` are exceptions that all ranks raise together: these, and
    any others that all raise at about the same time, leave the block as they are.  After another exception the
    raising rank goes on with it, and the others end with exit code 1.  ``iteration`` may be set at any time.
    """

    world: World
    timeout_seconds: float
    every_seconds: float = 1.0
    dead_after_seconds: float = 120.0
    agreed: tuple[type[BaseException], ...] = ()
    iteration: Callable[[], int] = lambda: 0
    _over: threading.Event = field(default_factory=threading.Event, init=False)
    _failure: Failure | None = field(default=None, init=False)
    _num_beats: int = field(default=0, init=False)
    _raised: BaseException | None = field(default=None, init=False)
    _ending: threading.Lock = field(default_factory=threading.Lock, init=False)

    def __post_init__(self) -> None:
        if not 0 < 3 * self.every_seconds <= self.dead_after_seconds:
            raise ValueError(
                f"a rank that gives a sign of life every {self.every_seconds:g} s cannot be held for dead after "
                f"{self.dead_after_seconds:g} s; allow for three signs at least"
            )

    def __enter__(self) -> "Watch":
        if self.world.size == 1:
            return self
        self._prefix = self.world.on_first(lambda: uuid.uuid4().hex, "watch")
        self._notices, self._guards_notices, self._own_notices = (self._connect() for _ in range(3))
        self._whereabouts = Whereabouts(self.world)
        own = self._whereabouts(self.iteration())
        self._notices.stand(own)
        everyone = [Standing(**values) for values in self.world.everyones(asdict(own), "watch")]
        self._machine = [standing for standing in everyone if standing.machine == own.machine]
        self._ends = [os.pidfd_open(other.process_id) for other in self._machine if other.rank != own.rank]
        looked_at = self._everyone if self.world.is_first else [0]
        self._signs = Signs(looked_at, self.dead_after_seconds / self.every_seconds)
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._give_signs, self._guard)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: TracebackType | None) -> None:
        if self.world.size == 1:
            return
        with self._ending:
            # from here on what others fail by does not end this process: it ends by its own exception
            self._raised = error
        if error is not None and not isinstance(error, self.agreed):
            # a launcher that has seen another rank end kills this one before it has said why
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            failure = self._leave(raised(error, self._whereabouts(self.iteration()), self.agreed) if error else None)
            self._over.set()
            for thread in self._threads:
                thread.join()
            for end in self._ends:
                os.close(end)
            self._say_goodbye()
        except RuntimeError:
            # the store went with the process that held it, which the threads notice as well
            self._over.wait(self._grace_seconds)
            failure = self._failure
        if failure is not None:
            self._say(failure)

    @property
    def _everyone(self) -> range:
        return range(self.world.size)

    @property
    def _grace_seconds(self) -> float:
        """For the threads of all ranks to have had their turn."""
        return 3 * self.every_seconds + 2.0

    def _leave(self, own: Failure | None) -> Failure | None:
        """Wait until all ranks have left, or the run has failed; returns what it failed by, if not by own doing."""
        notices = self._own_notices
        notices.leave(self.world.rank, own)
        patience = self.timeout_seconds if own and own.is_agreed else self._grace_seconds
        deadline = time.monotonic() + patience
        while not notices.have_all_left:
            if self._failure is not None:
                return self._failure
            if own is not None and time.monotonic() > deadline:
                self._failure = notices.fail(self._held_up(notices) if own.is_echo else own)
                return self._failure
            time.sleep(0.05)
        if own is None or not own.is_echo:
            return None
        return next(iter(notices.causes(self._everyone)), None)

    def _give_signs(self) -> None:
        while not self._over.wait(self.every_seconds):
            try:
                failure = self._give_sign()
            except RuntimeError:
                failure = self._reconnect()
            self._num_beats += 1
            if failure is not None:
                self._end(failure)

    def _reconnect(self) -> Failure | None:
        """A lost connection can be made again, a lost store cannot."""
        try:
            self._notices = self._connect()
        except RuntimeError as error:
            # where the process that held it was on this machine, the other thread can say more
            self._over.wait(2 * self.every_seconds)
            return lost_store(self._notices.address, f"is gone, and with it its process: {error}")
        return None

    def _give_sign(self) -> Failure | None:
        notices, rank = self._notices, self.world.rank
        notices.stand(self._whereabouts(self.iteration()))
        if failure := notices.failure():
            return failure
        if notices.is_asked(rank):
            notices.answer(rank, main_thread_stack())
        standings = notices.standings(self._signs.ranks)
        if dumb := self._signs.look(standings):
            return notices.fail(silent(dumb, notices.standings(self._everyone), self.dead_after_seconds))
        if self.world.is_first and is_held_up(standings, _BEFORE_TIMEOUT * self.timeout_seconds):
            return notices.fail(self._held_up(notices))
        return None

    def _guard(self) -> None:
        num_looks, num_beats = 0, 0
        while not self._over.is_set():
            # at once when one ends: a launcher that hears of it kills the others within a tenth of a second
            if select.select(self._ends, [], [], self.every_seconds)[0]:
                gone = [other for other in self._machine if process_name(other.process_id) != other.process]
                # the others end as well when a failure is known
                if gone and self._failure is None and (failure := self._died(gone)):
                    self._end(failure)
                self._over.wait(self.every_seconds)
            num_looks = num_looks + 1 if num_beats == self._num_beats else 0
            num_beats = self._num_beats
            if num_looks * self.every_seconds >= self.dead_after_seconds:
                why = f"has not answered for {self.dead_after_seconds:g} s"
                self._end(lost_store(self._notices.address, why), at_once=True)

    def _died(self, gone: list[Standing]) -> Failure | None:
        notices = self._guards_notices
        try:
            if notices.have_all_left:
                return None
            everyone = notices.standings(self._everyone)
            return notices.fail(died([everyone[standing.rank] for standing in gone], everyone))
        except RuntimeError:
            return died(gone, self._machine)

    def _held_up(self, notices: Notices) -> Failure:
        everyone = notices.standings(self._everyone)
        found = suspects(everyone)
        if causes := notices.causes([standing.rank for standing in found]):
            return causes[0]
        asked = [standing.rank for standing in found[:_MOST_STACKS]]
        notices.ask(asked)
        if self.world.rank in asked:
            notices.answer(self.world.rank, main_thread_stack())
        return held_up(found, everyone, notices.answers(asked, self._grace_seconds))

    def _end(self, failure: Failure, *, at_once: bool = False) -> None:
        """Say why, and end this process: its main thread may be in an exchange, which nothing else ends.

        A main thread that is on its way out by an exception goes that way, unless ``at_once``: the store blocks it.
        """
        with self._ending:
            self._failure = self._failure or failure
            if self._raised is not None and not at_once:
                return
            if self._raised is not None:
                print(traceback_of(self._raised), file=sys.stderr)
            self._say(self._failure)
            sys.stdout.flush()
            goodbye = threading.Thread(target=self._say_goodbye, daemon=True)
            goodbye.start()
            goodbye.join(self._grace_seconds)
            os._exit(FAILED)

    def _say_goodbye(self) -> None:
        """The first rank may hold the store, and one that raised holds connections whose end is an error elsewhere."""
        is_culprit = self._failure is not None and self.world.rank in self._failure.culprits
        with suppress(RuntimeError):
            self._own_notices.say_goodbye(self._grace_seconds, last=self.world.is_first or is_culprit)

    def _say(self, failure: Failure) -> None:
        """The headline on every rank but one that raises it itself, the text on one rank a machine."""
        rank = self.world.rank
        if self._raised is None or rank not in failure.culprits:
            print(f"fastgrpo: {failure.headline}", file=sys.stderr)
        if rank == speaker([standing.rank for standing in self._machine], failure):
            print(failure.text, file=sys.stderr)
        sys.stderr.flush()

    def _connect(self) -> Notices:
        return Notices(self._prefix, self.world.size, _CONNECT_SECONDS)
