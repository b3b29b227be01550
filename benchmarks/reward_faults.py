"""Training on a reward server that fails: does the run end as an undisturbed one, or stop where it can go on?

    python -m benchmarks.reward_faults

Each run is ``fastgrpo train reward=http`` on the embedded model, against ``fastgrpo serve-reward reward=shapes`` behind
a proxy that, once two iterations are done, kills the server or spoils its answers.  Compared with the undisturbed run:
metrics.jsonl but for time and memory, and the bytes of the weights and averages.  A server that stays dead must end the
run with exit code 1, a message and a checkpoint of the last iteration, from which it ends as the undisturbed one when
the server is back.  Exits with 1 where that is not so.
"""

import argparse
import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.fault_proxy import Fault, FaultProxy, garbage, partial, slow
from benchmarks.lasting import different_metrics
from benchmarks.report import table, write_report
from benchmarks.reward_server import Server
from fastgrpo.records.json_lines import read_rows

SETTINGS = (
    "reward=http",
    "reward.terms.http.name=shapes",
    "reward.terms.http.batch=8",
    "reward.terms.http.timeout_seconds=3.0",
    "train.iterations=6",
    "train.prompts_per_iteration=2",
    "train.group_size=8",
    "evaluate.every=3",
    "evaluate.images_per_prompt=1",
    # only a failing reward makes one before the end
    "checkpoint.every=100",
    "runtime.threads=1",
)
PATIENT, IMPATIENT = "reward.terms.http.patience_seconds=120.0", "reward.terms.http.patience_seconds=5.0"
DISTURBED_AFTER = 2
RESTART_SECONDS = 3.0
FILES = ("weights.safetensors", "ema.safetensors")


@dataclass
class Outcome:
    """Of one run: how it ended, what the proxy did, and what differs from the undisturbed run."""

    case: str
    seconds: float = 0.0
    requests: int = 0
    faults: int = 0
    ended: str = ""
    failures: list[str] = field(default_factory=list)


class Runs:
    """The runs in ``out``, each against a server that is alive when it begins."""

    def __init__(self, out: Path, overrides: list[str]) -> None:
        out.mkdir(parents=True)
        self.out, self._overrides = out, overrides
        self.server = Server(out / "server.txt")
        self.server.wait()
        self.proxy = FaultProxy(self.server.port)

    def train(self, case: str, *words: str) -> tuple[int, str, float]:
        """Exit code, last words on stderr and seconds of ``fastgrpo train``."""
        begun = time.monotonic()
        command = [sys.executable, "-m", "fastgrpo.cli", "train", *SETTINGS, *self._overrides]
        if not any(word.startswith("reward.terms.http.endpoints") for word in words):
            command.append(f"reward.terms.http.endpoints=[{self.proxy.url}]")
        done = subprocess.run([*command, f"output={self.out / case}", *words], capture_output=True, text=True)
        (self.out / f"{case}.txt").write_text(done.stdout + done.stderr)
        return done.returncode, (done.stderr.strip().splitlines() or [""])[-1], time.monotonic() - begun

    def lines(self, case: str) -> int:
        """The last iteration that was written."""
        rows = read_rows(self.out / case / "metrics.jsonl")
        return rows[-1]["iteration"] if rows else -1

    def disturbed(self, case: str, fault: Fault, times: int) -> Callable[[], Fault | None]:
        """``fault`` for so many requests once ``DISTURBED_AFTER`` iterations are written."""
        left = itertools.repeat(fault, times)
        return lambda: next(left, None) if self.lines(case) >= DISTURBED_AFTER else None

    def differences(self, case: str) -> list[str]:
        """Where metrics or weights are not those of the undisturbed run."""
        found = different_metrics(self.out / case, self.out / "undisturbed")
        last = max((self.out / "undisturbed" / "checkpoints").glob("step_*"))
        for name in FILES:
            path = self.out / case / "checkpoints" / last.name / name
            if not path.exists() or path.read_bytes() != (last / name).read_bytes():
                found.append(f"{last.name}/{name}")
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/reward_faults"), help="a new directory")
    parser.add_argument("overrides", nargs="*", help="further key=value for every run")
    arguments = parser.parse_args()
    runs = Runs(arguments.out, arguments.overrides)
    server = runs.server
    try:
        outcomes = [
            _finishes(runs, "undisturbed", lambda: None),
            _finishes(
                runs, "killed_and_restarted", runs.disturbed("killed_and_restarted", _killing(server, restart=True), 1)
            ),
            _finishes(runs, "garbage", runs.disturbed("garbage", garbage(), 18)),
            _finishes(runs, "slow", runs.disturbed("slow", slow(4.0), 4)),
            _finishes(runs, "partial", runs.disturbed("partial", partial(), 16)),
            _one_of_two_dies(runs),
            _stays_dead(runs),
        ]
    finally:
        server.kill()
        runs.proxy.close()
    _report(outcomes, arguments.overrides)
    if any(outcome.failures for outcome in outcomes):
        sys.exit(1)


def _finishes(runs: Runs, case: str, plan: Callable[[], Fault | None], *words: str) -> Outcome:
    """A run that must end as the undisturbed one."""
    requests, faults = runs.proxy.requests, runs.proxy.faults
    runs.proxy.plan = plan
    code, said, seconds = runs.train(case, *(words or (PATIENT,)))
    outcome = Outcome(case, seconds, runs.proxy.requests - requests, runs.proxy.faults - faults, f"exit code {code}")
    if code != 0:
        outcome.failures.append(said)
    outcome.failures += runs.differences(case)
    if case != "undisturbed" and not outcome.faults:
        outcome.failures.append("it was not disturbed")
    print(outcome)
    return outcome


def _one_of_two_dies(runs: Runs) -> Outcome:
    """Two servers, of which the one behind the proxy is killed for good."""
    second = Server(runs.out / "second_server.txt")
    second.wait()
    try:
        endpoints = f"reward.terms.http.endpoints=[{runs.proxy.url},http://127.0.0.1:{second.port}]"
        fault = runs.disturbed("one_of_two_dies", _killing(runs.server, restart=False), sys.maxsize)
        return _finishes(runs, "one_of_two_dies", fault, PATIENT, endpoints)
    finally:
        second.kill()
        runs.server.start()
        runs.server.wait()


def _stays_dead(runs: Runs) -> Outcome:
    """A run that must stop with its last iteration saved, and go on when the server is back."""
    case = "stays_dead"
    requests, faults = runs.proxy.requests, runs.proxy.faults
    runs.proxy.plan = runs.disturbed(case, _killing(runs.server, restart=False), sys.maxsize)
    code, said, seconds = runs.train(case, IMPATIENT)
    outcome = Outcome(case, seconds, ended=f"exit code {code}: {said}")
    done, saved = runs.lines(case), [path.name for path in (runs.out / case / "checkpoints").glob("step_*")]
    if code != 1 or "no answer after" not in said or "resume=true" not in said:
        outcome.failures.append(f"exit code {code} and {said!r}")
    if saved != [f"step_{done:06d}"]:
        outcome.failures.append(f"iteration {done} was written, but saved are {saved}")
    runs.server.start()
    runs.server.wait()
    runs.proxy.plan = lambda: None
    code, said, more_seconds = runs.train(case, PATIENT, "resume=true")
    outcome.ended += f"; resumed after iteration {done}: exit code {code}"
    outcome.seconds += more_seconds
    outcome.requests, outcome.faults = runs.proxy.requests - requests, runs.proxy.faults - faults
    if code != 0:
        outcome.failures.append(said)
    outcome.failures += runs.differences(case)
    print(outcome)
    return outcome


def _killing(server: Server, *, restart: bool) -> Fault:
    """SIGKILL while the request is under way, and a new process some seconds later."""

    def kill(forward: object) -> None:
        server.kill()
        if restart:
            threading.Timer(RESTART_SECONDS, server.start).start()

    return kill


def _report(outcomes: list[Outcome], overrides: list[str]) -> None:
    rows = [
        [
            o.case.replace("_", " "),
            f"{o.seconds:.0f}",
            str(o.requests),
            str(o.faults),
            o.ended,
            "; ".join(o.failures) or "none",
        ]
        for o in outcomes
    ]
    num_equal = sum(not outcome.failures for outcome in outcomes[1:])
    body = (
        f"{num_equal} of {len(outcomes) - 1} disturbed runs ended with the metrics and, bit for bit, the weights of "
        "the undisturbed one, so no reward was recorded that the server had not given.  The trouble begins after "
        f"iteration {DISTURBED_AFTER} of 6.  Killed is by SIGKILL, with a request under way; a restart takes place "
        f"{RESTART_SECONDS:g} s later.  Disturbed are requests that the proxy spoiled; while the server was dead, "
        "others failed as well.\n\n"
        + table(["server", "seconds", "requests", "disturbed", "end of the run", "differences"], rows)
    )
    data = {"settings": [*SETTINGS, *overrides], "runs": [vars(outcome) for outcome in outcomes]}
    print(write_report("reward_faults", title="Training on a reward server that fails", body=body, data=data))


if __name__ == "__main__":
    main()
