"""Sides in processes of their own, one iteration at a time: neither inherits the other's threads, caches or patches."""

import multiprocessing
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

Work = Callable[[], Callable[[], Any]]
_GOODBYE_SECONDS = 30


class ChildError(RuntimeError):
    """A side failed; the message is its traceback."""


@contextmanager
def children(sides: Mapping[str, Work]) -> Iterator[dict[str, Callable[[], Any]]]:
    """For each side something to call: it runs what the side's ``Work`` made, in the side's process, and waits.

    A side that waits gives its cached GPU memory back.  Raises ChildError where a side raised.
    """
    context = multiprocessing.get_context("spawn")
    running: dict[str, tuple[Any, Connection]] = {}
    try:
        for name, work in sides.items():
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(work, there), daemon=True)
            process.start()
            there.close()
            running[name] = process, here
        # all of them import and load at the same time
        for name, (_, here) in running.items():
            _answer(name, here)
        yield {name: partial(_ask, name, here) for name, (_, here) in running.items()}
    finally:
        for process, here in running.values():
            here.close()
            process.join(_GOODBYE_SECONDS)
            if process.is_alive():
                process.kill()


def _ask(name: str, connection: Connection) -> Any:
    connection.send(None)
    return _answer(name, connection)


def _answer(name: str, connection: Connection) -> Any:
    try:
        succeeded, answer = connection.recv()
    except EOFError:
        raise ChildError(f"{name} ended without an answer; was it killed for its memory?") from None
    if not succeeded:
        raise ChildError(f"{name} failed:\n{answer}")
    return answer


def _serve(work: Work, connection: Connection) -> None:
    try:
        run = work()
        connection.send((True, None))
        while True:
            connection.recv()
            answer = run()
            # a side that never imported it has nothing to give back, and need not wait for its import
            if "torch" in sys.modules:
                sys.modules["torch"].cuda.empty_cache()
            connection.send((True, answer))
    except EOFError:
        # the other end has had enough
        return
    except Exception:
        connection.send((False, traceback.format_exc()))
