"""Everything that a first GPU should be asked, most valuable first, until the minutes are over.

    python -m benchmarks.first_contact --minutes 12 --wheels DIR --checkout FLOW_GRPO
    python -m benchmarks.first_contact --output DIR             go on where another machine stopped, in its folder
    python -m benchmarks.first_contact --rehearse               in miniature on a CPU: does everything run?

Needs torch with CUDA, and what README.md says to carry; it begins with the standard library alone.  Steps and limits
are in steps.py.  Results are written after each step: report.md for reading, state.json to go on from, log.txt.
Exit code 0: nothing failed; 1: something did; 2: it could not begin.
"""

import argparse
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.first_contact import wheels
from benchmarks.first_contact.contact import Contact
from benchmarks.first_contact.runner import FAILED, TIMED_OUT
from benchmarks.first_contact.state import State
from benchmarks.first_contact.steps import STEPS, Step

# without which a directory is no checkout of flow_grpo
_THEIR_SCRIPT = "scripts/train_sd3.py"
_SCRATCH = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "fastgrpo" / "first_contact"


def main(arguments_of_shell: Sequence[str] | None = None, steps: Sequence[Step] = STEPS) -> int:
    arguments = _parse(arguments_of_shell, steps)
    deadline = time.monotonic() + 60 * arguments.minutes
    output, scratch = arguments.output.absolute(), arguments.scratch.expanduser().absolute()
    checkout = arguments.checkout and arguments.checkout.expanduser().absolute()
    try:
        if checkout and not (checkout / _THEIR_SCRIPT).is_file():
            raise ValueError(f"--checkout {checkout} is no checkout of flow_grpo: it lacks {_THEIR_SCRIPT}")
        output.mkdir(parents=True, exist_ok=True)
        state = State.read(output / "state.json")
        # what cannot be written is said now, not after the first step
        state.write()
        wheels.link_packages(scratch / "site")
        if arguments.wheels and (installed := wheels.install(arguments.wheels.absolute(), scratch / "site")):
            print(f"installed for the steps alone: {', '.join(installed)}", flush=True)
    except (ValueError, OSError) as error:
        print(f"first_contact: {error}", file=sys.stderr)
        return 2
    contact = Contact(
        output=output,
        scratch=scratch,
        state=state,
        steps=steps,
        deadline=deadline,
        checkout=checkout,
        commit=arguments.commit or wheels.commit(),
        rehearses=arguments.rehearse,
        slowness=arguments.slowness,
    )
    chosen = [step for step in steps if not arguments.steps or step.each_machine or step.name in arguments.steps]
    with _terminable():
        if not contact(chosen, again=arguments.again):
            return 2
    print(f"\n{output / 'report.md'}", flush=True)
    return int(any(record.status in (FAILED, TIMED_OUT) for record in state.steps.values()))


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM unwinds, so that a step ends with what ran it."""
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parse(arguments_of_shell: Sequence[str] | None, steps: Sequence[Step]) -> argparse.Namespace:
    names = [step.name for step in steps]
    # $OUT is what a lent machine brings back
    output = Path(os.environ["OUT"]) if os.environ.get("OUT") else Path("outputs/first_contact")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=_positive, default=12.0, help="after which nothing runs any more")
    parser.add_argument("--output", type=Path, default=output, help="$OUT, else outputs/first_contact")
    parser.add_argument("--wheels", type=Path, help="a directory of wheels, of which those that lack are installed")
    parser.add_argument("--checkout", type=Path, help="of flow_grpo; its steps wait for one")
    parser.add_argument("--steps", type=lambda text: text.split(","), default=[], help=f"of {','.join(names)}")
    parser.add_argument("--again", action="store_true", help="also what failed before")
    parser.add_argument("--commit", help="of this code, where there is no git to ask")
    parser.add_argument("--scratch", type=Path, default=_SCRATCH, help="for caches, large, not to be kept")
    parser.add_argument(
        "--slowness", type=_positive, default=1.0, help="all limits times this, for slow or shared CPUs"
    )
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, in miniature")
    parsed = parser.parse_args(arguments_of_shell)
    if unknown := set(parsed.steps) - set(names):
        parser.error(f"there is no step {', '.join(sorted(unknown))}; they are {', '.join(names)}")
    return parsed


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
