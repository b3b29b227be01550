"""Questions to several servers that may fail: asked until each has its answer, or patience is at its end.

A server that fails rests for 0.5 s, and for twice as long each further time, up to 15 s (times a random number in
[0.5, 1], so that clients do not come back all at once) or for as long as it asked; the others take over.  Until it has
answered again it gets one question at a time.  One that says that it is busy gets at most as many as it was then
dealing with, and one more for each ten answers.
"""

import logging
import math
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Protocol

from fastgrpo.rewards.remote.connection import Connection, check_endpoint
from fastgrpo.rewards.remote.errors import KEY, AskAgain, Refused, RemoteError, ServerFailed
from fastgrpo.rewards.remote.greeting import wait_for_any

_FIRST_REST_SECONDS = 0.5
_LONGEST_REST_SECONDS = 15.0
_LOOK_AGAIN_SECONDS = 0.02
_MORE_PER_ANSWER = 0.1
_log = logging.getLogger(__name__)
# its own, so that waiting leaves the global generator, and with it the run, as it is
_jitter = random.Random()


class Question(Protocol):
    """Something to be asked in one or more requests."""

    def body(self) -> bytes:
        """What is still to be asked."""
        ...

    def take(self, answer: Any, /) -> None:
        """Keep what is good.

        AskAgain if something is missing, ServerFailed if this is no answer at all, RemoteError if it was asked enough.
        """
        ...


@dataclass
class _Server:
    url: str
    in_flight: int = 0
    asked_at: float = 0.0
    failed_at: float = 0.0
    rests_until: float = 0.0
    failures: int = 0
    most: float = math.inf

    def is_free(self, now: float) -> bool:
        most = 1 if self.failures else self.most
        return now >= self.rests_until and self.in_flight + 1 <= most


@dataclass(frozen=True, kw_only=True)
class Endpoints:
    """Servers that answer alike.  Thread-safe: ``concurrency`` bounds the questions of all callers together.

    ``patience_seconds`` is how long one question is asked again; the last attempt begins when it is over.  Until a
    server has answered for the first time it is ``startup_patience_seconds``, if these are fewer.
    """

    reward: str
    urls: Sequence[str]
    connection: Connection
    concurrency: int
    patience_seconds: float
    startup_patience_seconds: float
    _has_answered: threading.Event = field(default_factory=threading.Event, init=False, repr=False)
    _servers: list[_Server] = field(init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)
    _turns: threading.Semaphore = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.urls, str) or not self.urls:
            raise ValueError(
                f"{KEY}.endpoints is a list of addresses, as in [http://127.0.0.1:8000], got {self.urls!r}"
            )
        connection = self.connection
        for key, value, least in (
            ("concurrency", self.concurrency, 1),
            ("max_answer_bytes", connection.max_answer_bytes, 1),
            ("patience_seconds", self.patience_seconds, 0),
            ("startup_patience_seconds", self.startup_patience_seconds, 0),
        ):
            if not value >= least:
                raise ValueError(f"{KEY}.{key} must be at least {least}, got {value}")
        if not 0 < connection.timeout_seconds < math.inf:
            raise ValueError(f"{KEY}.timeout_seconds must be positive and finite, got {connection.timeout_seconds}")
        object.__setattr__(self, "_servers", [_Server(check_endpoint(url)) for url in self.urls])
        object.__setattr__(self, "_turns", threading.BoundedSemaphore(self.concurrency))

    @property
    def _patience(self) -> tuple[str, float]:
        """The key that bounds how long a question is asked now, and its seconds."""
        if self._has_answered.is_set() or self.patience_seconds < self.startup_patience_seconds:
            return "patience_seconds", self.patience_seconds
        return "startup_patience_seconds", self.startup_patience_seconds

    def greet(self, path: str) -> None:
        """RemoteError unless a server answers something to GET ``path`` in the patience of a beginning."""
        wait_for_any(self.reward, self.urls, path, self.connection, self.startup_patience_seconds)

    def ask(self, path: str, questions: Sequence[Question]) -> None:
        """Ask until every question has what it wants; RemoteError for the first that cannot get it."""
        stop = threading.Event()
        left, ended = iter(questions), SimpleQueue[BaseException | None]()
        lock = threading.Lock()

        def work() -> None:
            while not stop.is_set():
                with lock:
                    question = next(left, None)
                if question is None:
                    return
                try:
                    self._ask(path, question, stop)
                    ended.put(None)
                except BaseException as error:
                    ended.put(error)

        for _ in range(min(self.concurrency, len(questions))):
            # daemons, since a run that is interrupted shall not wait for a server that does not answer
            threading.Thread(target=work, daemon=True).start()
        try:
            for _ in questions:
                if (error := ended.get()) is not None:
                    raise error
        finally:
            stop.set()

    def _ask(self, path: str, question: Question, stop: threading.Event) -> None:
        with self._turns:
            begun = time.monotonic()
            attempts = 0
            while server := self._take_server(begun, stop):
                attempts += 1
                asked_at = time.monotonic()
                try:
                    answer = self.connection.post(server.url + path, question.body())
                    question.take(answer)
                    return self._give_back(server)
                except RemoteError:
                    self._give_back(server)
                    raise
                except Refused as error:
                    self._give_back(server)
                    raise RemoteError(f"reward {self.reward!r} at {server.url}: {error}") from error
                except AskAgain as error:
                    self._give_back(server)
                    cause: Exception = error
                    self._pause(attempts, stop)
                except ServerFailed as error:
                    self._let_rest(server, asked_at, error)
                    cause = error
                if time.monotonic() - begun >= self._patience[1]:
                    raise self._given_up(server, attempts, time.monotonic() - begun, cause) from cause

    def _take_server(self, begun: float, stop: threading.Event) -> _Server | None:
        """The least busy server that is free, when there is one; after the patience any; none if the caller stopped."""
        while not stop.is_set():
            with self._lock:
                now = time.monotonic()
                is_late = now - begun >= self._patience[1]
                free = [server for server in self._servers if is_late or server.is_free(now)]
                if free:
                    server = min(free, key=lambda server: (server.in_flight, server.asked_at))
                    server.in_flight += 1
                    server.asked_at = now
                    return server
            stop.wait(_LOOK_AGAIN_SECONDS)
        return None

    def _give_back(self, server: _Server) -> None:
        self._has_answered.set()
        with self._lock:
            server.in_flight -= 1
            failures, server.failures = server.failures, 0
            server.most += _MORE_PER_ANSWER
        if failures:
            _log.warning("reward %r: %s answers again", self.reward, server.url)

    def _let_rest(self, server: _Server, asked_at: float, error: ServerFailed) -> None:
        with self._lock:
            server.in_flight -= 1
            now = time.monotonic()
            # requests that were under way together fail together: that is one failure
            if asked_at >= server.failed_at:
                server.failures += 1
                server.failed_at = now
            if error.is_busy:
                server.most = max(1, min(server.most, server.in_flight))
            rest = max(_rest_seconds(server.failures), error.rest_seconds)
            server.rests_until = max(server.rests_until, now + rest)
            is_first = server.failures == 1
        level = logging.WARNING if is_first else logging.DEBUG
        said = (self.reward, server.url, error, rest, self._patience[1])
        _log.log(level, "reward %r: %s: %s; asking again in %.1f s, for up to %g s in all", *said)

    def _pause(self, attempts: int, stop: threading.Event) -> None:
        stop.wait(min(_rest_seconds(attempts), self._patience[1]))

    def _given_up(self, server: _Server, attempts: int, seconds: float, cause: Exception) -> RemoteError:
        others = f" (of {len(self._servers)} endpoints)" if len(self._servers) > 1 else ""
        return RemoteError(
            f"reward {self.reward!r} at {server.url}{others}: no answer after {attempts} attempts in {seconds:.0f} s, "
            f"the last failed with {cause}; mend the server, or raise {KEY}.{self._patience[0]} if it only needs time"
        )


def _rest_seconds(failures: int) -> float:
    return min(_FIRST_REST_SECONDS * 2 ** min(failures - 1, 16), _LONGEST_REST_SECONDS) * _jitter.uniform(0.5, 1.0)
