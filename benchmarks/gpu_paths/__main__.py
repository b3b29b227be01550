"""Runs each way in which CUDA is used, a process each: does it run, and what does it say where it does not?

    python -m benchmarks.gpu_paths                     all cases that take seconds
    python -m benchmarks.gpu_paths --large             and full-size models of random weights, an iteration each
    python -m benchmarks.gpu_paths nft-eager reward_rank
    python -m benchmarks.gpu_paths --list

Exit code 1 if a case raised, 2 where there is no CUDA device.  It judges that things run, not what comes out: that is
what ``pytest -m gpu`` is for.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.first_contact.runner import end_group
from benchmarks.gpu_paths.cases import Case, all_cases

RAISED, NO_CUDA = 1, 2
_SECONDS, _SECONDS_OF_LARGE = 600, 3600
# torchrun's ranks are groups of their own, which it ends, if asked, within 30 s
_GRACE_SECONDS = 40


def main(arguments_of_shell: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="names, or patterns such as 'nft-*'; default: all that are small")
    parser.add_argument("--large", action="store_true", help="full-size models, too")
    parser.add_argument("--list", action="store_true", help="name the cases, and run none")
    arguments = parser.parse_args(arguments_of_shell)
    try:
        chosen = _chosen(arguments.cases, arguments.large)
    except ValueError as error:
        parser.error(str(error))
    if arguments.list:
        print("\n".join(case.name for case in chosen))
        return 0
    if not torch.cuda.is_available():
        print("there is no CUDA device here, and what this tries are its paths", file=sys.stderr)
        return NO_CUDA
    num_gpus, found = torch.cuda.device_count(), []
    with TemporaryDirectory() as directory:
        for case in chosen:
            start = time.monotonic()
            outcome = f"left out: {why}" if (why := case.why_not(num_gpus)) else run(case, Path(directory))
            found.append(outcome)
            print(f"{case.name:<36} {time.monotonic() - start:5.0f} s  {outcome or 'pass'}", flush=True)
    num_raised = sum(outcome.startswith("raised") for outcome in found)
    print(f"{found.count('')} pass, {num_raised} raised, {len(found) - found.count('') - num_raised} left out")
    return RAISED if num_raised else 0


def run(case: Case, directory: Path) -> str:
    """What the case raised, in one line; empty if nothing."""
    for overrides in case.runs:
        command = command_of(case, overrides, directory / case.name)
        limit = _SECONDS_OF_LARGE if case.is_large else _SECONDS
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, process_group=0
        ) as process:
            try:
                _, errors = process.communicate(timeout=limit)
            except subprocess.TimeoutExpired:
                return f"raised nothing, but did not end in {limit} s"
            finally:
                # with what it started, which would hold the GPU
                end_group(process, _GRACE_SECONDS)
        if process.returncode != 0:
            return f"raised {error_line(errors)}"
    return ""


def command_of(case: Case, overrides: Sequence[str], output: Path) -> list[str]:
    """What a user would write."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(case.ranks)]
    train = ["-m", "fastgrpo", "train", f"output={output}", "runtime.device=cuda", *overrides]
    return [sys.executable, *(launcher if case.ranks > 1 else []), *train]


def error_line(text: str) -> str:
    """The line of a process's errors that says what went wrong: the command's own, or the last of a traceback."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    own = [line for line in lines if line.startswith("fastgrpo: ") and "auto takes" not in line]
    # before those of a launcher, which come after it
    raised = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception", "Failure"))]
    return next(iter([*raised[-1:], *own[-1:], *lines[-1:]]), "nothing, and ended with an error")


def _chosen(patterns: Sequence[str], large: bool) -> list[Case]:
    cases = all_cases()
    if not patterns:
        return [case for case in cases.values() if large or not case.is_large]
    unknown = [pattern for pattern in patterns if not any(fnmatch(name, pattern) for name in cases)]
    if unknown:
        raise ValueError(f"no case is called {unknown[0]!r}; --list names them")
    return [case for name, case in cases.items() if any(fnmatch(name, pattern) for pattern in patterns)]


if __name__ == "__main__":
    sys.exit(main())
