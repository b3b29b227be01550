"""``report.md``: what was reached and what was not, then what each step wrote."""

from collections.abc import Sequence
from typing import Any

from benchmarks.first_contact.state import NOT_REACHED, Record, State
from benchmarks.first_contact.steps import Step

_REHEARSED = "**A rehearsal in miniature on a CPU: nothing here is a result.**"


def page(state: State, steps: Sequence[Step], *, rehearses: bool) -> str:
    """The whole report, in Markdown."""
    records = {step.name: state.steps.get(step.name) or Record(status=NOT_REACHED) for step in steps}
    parts = [
        "# First contact",
        *([_REHEARSED] if rehearses else []),
        "\n".join(f"- machine {number}: {_machine(one)}" for number, one in enumerate(state.machines, 1)),
        _table(steps, records),
        _not_reached(records),
        *(_section(step, records[step.name]) for step in steps if records[step.name].status != NOT_REACHED),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _machine(found: dict[str, Any]) -> str:
    if not found:
        return "nothing is known of it yet"
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    return f"{found['gpu'] or found['no_gpu']}; {found['cpu']}; commit {found['commit']}; {versions}"


def _table(steps: Sequence[Step], records: dict[str, Record]) -> str:
    lines = ["| step | | seconds | CPU seconds | machine | tells |", "|---|---|---|---|---|---|"]
    for step in steps:
        record = records[step.name]
        figures = [f"{record.seconds:.0f}", f"{record.cpu_seconds:.0f}", str(record.machine + 1)]
        shown = figures if record.status != NOT_REACHED else [""] * len(figures)
        lines.append(f"| {' | '.join((step.name, record.status, *shown, step.tells))} |")
    return "\n".join(lines)


def _not_reached(records: dict[str, Record]) -> str:
    lines = [
        f"- {name}: {record.reason or 'its turn did not come'}"
        for name, record in records.items()
        if record.status == NOT_REACHED
    ]
    told = "The next machine goes on there: `--output` with this folder."
    return "\n".join(["Not reached:", "", *lines, "", told]) if lines else "Every step had its turn."


def _section(step: Step, record: Record) -> str:
    reason = f": {record.reason}" if record.reason else ""
    texts = [text.strip() for name, text in record.results.items() if name.endswith(".md")]
    # titles of their own become those of parts of this page
    texts = ["\n".join(f"##{line}" if line.startswith("#") else line for line in text.splitlines()) for text in texts]
    tail = f"```\n{record.log}\n```" if record.log else ""
    return "\n\n".join(part for part in (f"## {step.name}, {record.status}{reason}", *texts, tail) if part)
