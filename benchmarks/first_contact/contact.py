"""The steps on one machine: begun in turn while they fit, each on record before and after it ran."""

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.first_contact.report import page
from benchmarks.first_contact.runner import COMPLETE, Outcome, run
from benchmarks.first_contact.state import BEGUN, NOT_REACHED, Record, State
from benchmarks.first_contact.steps import CHECKOUT, SCRATCH, Step
from benchmarks.first_contact.wheels import ROOT

ENVIRONMENT = "environment"
# at the end of the minutes for what is written last
_RESERVE_SECONDS = 10
_LOG_BYTES = 200_000
# of a step that went wrong, and of one that is done and has no page, whose last lines are then its findings
_TAIL_LINES, _FINDING_LINES = 40, 20
# of a file that is neither Markdown nor JSON: as much as a lent machine gives back
_LARGEST_FILE = 16 * 2**20


@dataclass(kw_only=True)
class Contact:
    """``deadline`` is by time.monotonic(); ``steps`` are all there are, of which a call is given some.

    Every limit is multiplied by ``slowness``.
    """

    output: Path
    scratch: Path
    state: State
    steps: Sequence[Step]
    deadline: float
    checkout: Path | None
    commit: str
    rehearses: bool
    slowness: float = 1.0

    def __call__(self, chosen: Sequence[Step], *, again: bool) -> bool:
        """Run what is not settled; False where the machine says that it has no GPU to run it on."""
        self.state.machines.append({})
        for step in chosen:
            known = self.state.steps.get(step.name)
            if known and known.is_settled(again) and not step.each_machine:
                continue
            if obstacle := self._obstacle(step):
                print(f"{step.name}: {NOT_REACHED}, {obstacle}", flush=True)
                # what failed before stays on record
                if not (known and known.is_settled(again=False)):
                    self.state.steps[step.name] = Record(status=NOT_REACHED, reason=obstacle)
                self._write()
            else:
                self._run(step)
            if step.name == ENVIRONMENT and self._lacks_gpu():
                return False
        return True

    @property
    def machine(self) -> dict[str, Any]:
        """What the environment step found on this one; empty before, or where it found nothing."""
        return self.state.machines[-1]

    def _obstacle(self, step: Step) -> str:
        """Why the step cannot be begun, or nothing."""
        if self.rehearses and step.rehearsal is None:
            return "it needs a GPU"
        if step.needs_checkout and self.checkout is None:
            return "it needs --checkout of flow_grpo"
        unfit = self.machine.get("unfit", {})
        if lacking := [name for name in step.needs if unfit.get(name) == "missing"]:
            return f"it needs {', '.join(lacking)}, and no wheel of it was carried"
        left = self.deadline - time.monotonic() - _RESERVE_SECONDS
        if left < self._limit(step):
            return f"it may take {self._limit(step):.0f} s, and {max(left, 0):.0f} s were left"
        return ""

    def _limit(self, step: Step) -> float:
        return step.seconds * self.slowness

    def _run(self, step: Step) -> None:
        print(f"{step.name}: at most {self._limit(step):.0f} s", flush=True)
        number = len(self.state.machines) - 1
        self.state.steps[step.name] = Record(status=BEGUN, reason="cut off with its machine", machine=number)
        self._write()
        written, log = self.scratch / "results" / step.name, self.scratch / "logs" / f"{step.name}.txt"
        shutil.rmtree(written, ignore_errors=True)
        written.mkdir(parents=True)
        log.parent.mkdir(parents=True, exist_ok=True)
        outcome = run(
            self._arguments(step),
            seconds=self._limit(step),
            log=log,
            directory=ROOT,
            environment=self._environment(written),
        )
        said = log.read_bytes()[-_LOG_BYTES:].decode(errors="replace")
        results = self._keep(step.name, written)
        self.state.steps[step.name] = Record(
            status=outcome.status,
            reason=outcome.reason,
            seconds=round(outcome.seconds, 1),
            cpu_seconds=round(outcome.cpu_seconds, 1),
            machine=number,
            results=results,
            log=_tail(said, outcome, results),
        )
        if step.name == ENVIRONMENT:
            self._note_machine()
        with (self.output / "log.txt").open("a", encoding="utf-8") as file:
            file.write(f"==== {step.name} on machine {number + 1}: {outcome.status} {outcome.reason}\n{said}\n")
        self._write()
        print(f"{step.name}: {outcome.status} in {outcome.seconds:.0f} s {outcome.reason}".rstrip(), flush=True)

    def _arguments(self, step: Step) -> list[str]:
        words = step.rehearsal or () if self.rehearses else step.command
        return [word.replace(CHECKOUT, str(self.checkout)).replace(SCRATCH, str(self.scratch)) for word in words]

    def _environment(self, written: Path) -> Mapping[str, str]:
        """Caches are shared: what one step compiled, the next one finds."""
        cache = self.scratch / "cache"
        path = [str(self.scratch / "site"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
            "PYTHONUNBUFFERED": "1",
            "XDG_CACHE_HOME": str(cache),
            "TRITON_CACHE_DIR": str(cache / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
            "HF_HUB_OFFLINE": "1",
            "BENCHMARK_RESULTS": str(written),
            "BENCHMARK_COMMIT": self.commit,
        }

    def _keep(self, name: str, written: Path) -> dict[str, Any]:
        """What the step wrote: text goes on record, all else into the output folder."""
        results: dict[str, Any] = {}
        for file in sorted(path for path in written.rglob("*") if path.is_file()):
            if file.suffix in (".md", ".json"):
                results[file.name] = _read(file)
            elif file.stat().st_size <= _LARGEST_FILE:
                shutil.copyfile(file, self.output / f"{name}_{file.name}")
        return results

    def _note_machine(self) -> None:
        """Also what a step that then failed or hung has found."""
        found = self.state.steps[ENVIRONMENT].results.get("environment.json")
        if isinstance(found, dict):
            self.machine.update(found, commit=self.commit)

    def _lacks_gpu(self) -> bool:
        """Only where it is said: a step that failed costs itself, and not those that would have run."""
        said = self.state.steps[ENVIRONMENT].status == COMPLETE and self.machine and not self.machine["gpu"]
        if self.rehearses or not said:
            return False
        why = self.machine["no_gpu"]
        print(f"first_contact: no GPU to ask: {why}; --rehearse runs in miniature without one", flush=True)
        return True

    def _write(self) -> None:
        self.state.write()
        text = page(self.state, self.steps, rehearses=self.rehearses)
        (self.output / "report.md").write_text(text, encoding="utf-8")


def _tail(said: str, outcome: Outcome, results: Mapping[str, Any]) -> str:
    """Of what a step printed, that which its pages do not say."""
    if outcome.status != COMPLETE:
        return "\n".join(said.splitlines()[-_TAIL_LINES:])
    has_page = any(name.endswith(".md") for name in results)
    return "" if has_page else "\n".join(said.splitlines()[-_FINDING_LINES:])


def _read(file: Path) -> Any:
    """Text, or what JSON says; half a file of a step that was ended is text."""
    text = file.read_text(encoding="utf-8", errors="replace")
    try:
        return json.loads(text) if file.suffix == ".json" else text
    except json.JSONDecodeError:
        return text
