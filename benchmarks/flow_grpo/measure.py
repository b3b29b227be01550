"""The sides of one recipe: checked, each as it will be timed, and then timed in turns."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from benchmarks.flow_grpo.agreement import Agreement
from benchmarks.flow_grpo.children import Work, children
from benchmarks.flow_grpo.setting import Setting
from benchmarks.flow_grpo.side import Iteration


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What makes a side, in what it computes, and what checks that it does the same work."""

    make: Work
    setting: Setting
    # none where ours is compared with itself
    check: Callable[[], Agreement] | None = None


class Checks:
    """Called, it makes the next of the checks: what it found, or the error as a line."""

    def __init__(self, checks: Mapping[str, Callable[[], Agreement]]) -> None:
        self._left = iter(checks.values())

    def __call__(self) -> Agreement | str:
        try:
            return next(self._left)()
        except Exception as error:
            return f"{type(error).__name__}: {error}"


def checked(entries: Mapping[str, Entry]) -> tuple[dict[str, Agreement], dict[str, str]]:
    """What the check of each side found, and of those that failed why they are not to be timed."""
    checks = {side: entry.check for side, entry in entries.items() if entry.check}
    agreements: dict[str, Agreement] = {}
    refused: dict[str, str] = {}
    if not checks:
        return agreements, refused
    with children({"the check": partial(Checks, checks)}) as run:
        for side in checks:
            found = run["the check"]()
            if isinstance(found, str):
                refused[side] = found
            elif found.holds:
                agreements[side] = found
            else:
                refused[side] = (
                    f"not the same work: its ratio is off by {found.ratio_deviation:.1e}, its gradients by "
                    f"{found.gradient_difference:.1e} of their length, where {found.tolerance} are allowed"
                )
    return agreements, refused


def timed(entries: Mapping[str, Entry], warm_up: int, rounds: int) -> dict[str, list[Iteration]]:
    """The iterations of each side.  Every other round goes backwards: what slows down later sides slows down all."""
    measured: dict[str, list[Iteration]] = {side: [] for side in entries}
    with children({side: entry.make for side, entry in entries.items()}) as run:
        for number in range(warm_up + rounds):
            for side in reversed(list(entries)) if number % 2 else entries:
                iteration = run[side]()
                # what is left of a run that is cut off
                what = f"round {number - warm_up + 1}" if number >= warm_up else "warm-up"
                parts = f"rollout {iteration.rollout_seconds:.2f} s, update {iteration.update_seconds:.2f} s"
                print(f"{side}, {what}: {iteration.num_images} images, {parts}", flush=True)
                if number >= warm_up:
                    measured[side].append(iteration)
    return measured
