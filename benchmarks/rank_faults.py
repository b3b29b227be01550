"""Does a job of several ranks survive one that dies, raises, stops or cannot write, and end as an undisturbed one?

    python -m benchmarks.rank_faults --kills 10

Every job is ``torchrun --max-restarts`` of ``fastgrpo train`` on four processes of this machine, and nobody touches it
but to disturb it.  Each disturbance hits a random rank at a random moment of an iteration:

    kill    SIGKILL
    raise   SIGINT, an exception in one rank only
    stop    SIGSTOP: the process stays, and answers nobody
    disk    a limit on the size of files it writes, which refuses the next checkpoint; of the first rank, which writes
            tensors that all ranks have

Compared with the undisturbed job: metrics.jsonl but for time and memory, and weights, averages and optimizer state, bit
for bit.  The log must say what happened to which rank.  Exits with 1 where that is not so.
"""

import argparse
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.lasting import different_metrics
from benchmarks.report import table, write_report
from fastgrpo.checkpoints.checkpoint import Checkpoint
from fastgrpo.checkpoints.train_state import as_named_tensors
from fastgrpo.records.json_lines import read_rows

NUM_RANKS = 4
SETTINGS = (
    "train.iterations=12",
    "train.prompts_per_iteration=2",
    "train.group_size=8",
    "evaluate.every=5",
    "evaluate.images_per_prompt=1",
    "checkpoint.every=2",
    "runtime.threads=1",
    "distributed.beat_seconds=0.5",
    "distributed.dead_after_seconds=10",
)
PATIENCE_SECONDS = 900.0
# less than the weights of a checkpoint, and more than anything else that is written
_MOST_BYTES = 1 << 20


class Job:
    """A torchrun of ``fastgrpo train`` into ``output``; what it says is in ``output``.txt."""

    def __init__(self, output: Path, overrides: Sequence[str], num_ranks: int = NUM_RANKS) -> None:
        self.output, self._log = output, output.with_suffix(".txt")
        launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}", "--max-restarts=9"]
        command = [sys.executable, "-m", *launcher, "-m", "fastgrpo", "train", *overrides, f"output={output}"]
        output.parent.mkdir(parents=True, exist_ok=True)
        with open(self._log, "w") as log:
            # killed as a whole, should this process be interrupted
            self._agent = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    @property
    def said(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def is_over(self) -> bool:
        return self._agent.poll() is not None

    def iterations(self) -> list[int]:
        """Those whose metrics are written."""
        return [row["iteration"] for row in read_rows(self.output / "metrics.jsonl")]

    def ranks(self) -> dict[int, int]:
        """The process of each rank that is alive."""
        children = Path(f"/proc/{self._agent.pid}/task/{self._agent.pid}/children").read_text().split()
        found: dict[int, int] = {}
        for child in children:
            # one that ends meanwhile is none
            with suppress(OSError):
                environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
                found |= {int(entry[5:]): int(child) for entry in environment if entry.startswith(b"RANK=")}
        return found

    def wait_for(self, iteration: int) -> None:
        """Until so many iterations are written; RuntimeError if the job ends before."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while max([-1, *self.iterations()]) < iteration:
            if self.is_over or time.monotonic() > deadline:
                raise RuntimeError(f"iteration {iteration} did not come; the job's words are in {self._log}")
            time.sleep(0.01)

    def finish(self) -> int:
        """torchrun's exit code."""
        try:
            return self._agent.wait(PATIENCE_SECONDS)
        finally:
            self.end()

    def end(self) -> None:
        """Kill what is left of it."""
        if not self.is_over:
            for process in [*self.ranks().values(), self._agent.pid]:
                os.kill(process, signal.SIGKILL)
            self._agent.wait()


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What is done to a rank's process, and what the log must say of rank ``{rank}``: a regular expression."""

    name: str
    strike: Callable[[int], object]
    says: str
    ranks: Sequence[int] = range(NUM_RANKS)


FAULTS = (
    Fault(name="kill", strike=lambda pid: os.kill(pid, signal.SIGKILL), says=r"rank {rank} on \S+ died"),
    Fault(
        name="raise",
        strike=lambda pid: os.kill(pid, signal.SIGINT),
        says=r"rank {rank} on \S+ raised KeyboardInterrupt",
    ),
    Fault(
        name="stop",
        strike=lambda pid: os.kill(pid, signal.SIGSTOP),
        says=r"rank {rank} on \S+ gave no sign of life|held by the first rank or its launcher, has not answered",
    ),
    Fault(
        name="disk",
        strike=lambda pid: resource.prlimit(pid, resource.RLIMIT_FSIZE, (_MOST_BYTES, resource.RLIM_INFINITY)),
        says=r"rank {rank}\b.*File too large",
        ranks=[0],
    ),
)


@dataclass
class Outcome:
    """Of one job: which rank was struck after which iteration, and what differs from the undisturbed job."""

    fault: str
    struck: list[tuple[int, int]] = field(default_factory=list)
    # from each strike to the next line of metrics: mostly the start of processes
    seconds_to_return: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def disturb(job: Job, fault: Fault, times: int, generator: random.Random, num_iterations: int) -> Outcome:
    """Strike a job so often, at moments spread over its iterations, and wait for its end."""
    outcome = Outcome(fault.name)
    for part in range(times):
        earliest, latest = (1 + (num_iterations - 2) * edge // times for edge in (part, part + 1))
        job.wait_for(generator.randrange(earliest, max(latest, earliest + 1)))
        rank = generator.choice(fault.ranks)
        rows = read_rows(job.output / "metrics.jsonl")
        time.sleep(generator.uniform(0.0, 1.5 * rows[-1].get("seconds/iteration", 0.0)))
        done = job.iterations()[-1]
        begun, before = time.monotonic(), job.ranks()
        fault.strike(before[rank])
        outcome.struck.append((rank, done))
        if not _returns(job, before):
            outcome.failures.append("the job was not restarted")
            break
        outcome.seconds_to_return.append(time.monotonic() - begun)
        if not re.search(fault.says.format(rank=rank), job.said):
            outcome.failures.append(f"the log does not say what happened to rank {rank}")
    if code := job.finish():
        outcome.failures.append(f"exit code {code}")
    return outcome


def _returns(job: Job, before: dict[int, int]) -> bool:
    """Wait until other processes have written metrics; a restarted job drops lines first that it writes again."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (ranks := job.ranks()) or set(ranks.values()) & set(before.values()):
        if job.is_over or time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    changed = _changed(job)
    while _changed(job) == changed and not job.is_over:
        time.sleep(0.02)
    return True


def _changed(job: Job) -> int:
    return os.stat(job.output / "metrics.jsonl").st_mtime_ns


def differences(output: Path, undisturbed: Path) -> list[str]:
    """Metrics, and tensors of the last checkpoint, that are not equal."""
    found = different_metrics(output, undisturbed)
    own, other = (_learned(path) for path in (output, undisturbed))
    names = sorted(own.keys() | other.keys())
    return found + [n for n in names if n not in own or n not in other or not torch.equal(own[n], other[n])]


def _learned(output: Path) -> dict[str, torch.Tensor]:
    checkpoints = Checkpoint(output / "checkpoints", every=1, keep=1)
    path = checkpoints.latest()
    if path is None:
        return {}
    return {f"{path.name}/{name}": tensor for name, tensor in as_named_tensors(checkpoints.load(path))[0].items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="so many in all; the other faults come once")
    parser.add_argument("--kills-a-job", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of ranks and moments")
    parser.add_argument("--out", type=Path, default=Path("outputs/rank_faults"), help="a new directory")
    parser.add_argument("overrides", nargs="*", help="further key=value for every job")
    arguments = parser.parse_args()
    overrides, generator = [*SETTINGS, *arguments.overrides], random.Random(arguments.seed)
    arguments.out.mkdir(parents=True)
    undisturbed = Job(arguments.out / "undisturbed", overrides)
    if undisturbed.finish() != 0:
        raise RuntimeError(f"the undisturbed job failed: {undisturbed.said[-2000:]}")
    num_iterations = undisturbed.iterations()[-1]
    kill, *others = FAULTS
    plan = [kill] * -(-arguments.kills // arguments.kills_a_job) + others
    left, outcomes = arguments.kills, []
    for index, fault in enumerate(plan):
        times = min(left, arguments.kills_a_job) if fault is kill else 1
        left -= times if fault is kill else 0
        job = Job(arguments.out / f"{index}_{fault.name}", overrides)
        try:
            outcome = disturb(job, fault, times, generator, num_iterations)
        finally:
            job.end()
        outcome.failures += differences(job.output, undisturbed.output)
        outcomes.append(outcome)
        print(outcome, flush=True)
    _report(outcomes, arguments)
    if any(outcome.failures for outcome in outcomes):
        sys.exit(1)


def _report(outcomes: list[Outcome], arguments: argparse.Namespace) -> None:
    rows = [
        [
            outcome.fault,
            ", ".join(f"rank {rank} after {iteration}" for rank, iteration in outcome.struck),
            ", ".join(f"{seconds:.0f}" for seconds in outcome.seconds_to_return),
            "; ".join(outcome.failures) or "none",
        ]
        for outcome in outcomes
    ]
    num_kills = sum(len(outcome.struck) for outcome in outcomes if outcome.fault == "kill")
    num_equal = sum(not outcome.failures for outcome in outcomes)
    body = (
        f"{num_equal} of {len(outcomes)} disturbed jobs of {NUM_RANKS} ranks, {num_kills} SIGKILLs among what befell "
        "them, restarted by themselves and ended with the metrics and, bit for bit, the weights, averages and "
        "optimizer state of the undisturbed one; the log of each names the rank.  Seconds are from the fault to the "
        "next line of metrics.  They are mostly the start of four processes on this machine's cores; torchrun gives a "
        "stopped rank 30 s before it kills it.\n\n"
        + table(["fault", "rank, after iteration", "seconds to return", "differences"], rows)
    )
    data = {
        "settings": [*SETTINGS, *arguments.overrides],
        "seed": arguments.seed,
        "jobs": [vars(outcome) for outcome in outcomes],
    }
    print(write_report("rank_faults", title="A rank that dies, raises, stops or cannot write", body=body, data=data))


if __name__ == "__main__":
    main()
