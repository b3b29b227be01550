"""What the children of the benchmark's tests run: a module that imports nothing large, since each child imports it."""

import os
from collections.abc import Callable
from functools import partial


def count() -> Callable[[], int]:
    calls: list[int] = []

    def call() -> int:
        calls.append(os.getpid())
        return len(calls)

    return call


def fail_when_made() -> Callable[[], int]:
    raise ZeroDivisionError("made")


def fail_when_called() -> Callable[[], float]:
    return partial(pow, 0.0, -1)


def die() -> Callable[[], None]:
    return partial(os._exit, 9)
