"""What is said at the end of a run: the scores before and after, the best evaluation, and what to open."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastgrpo.files.run_directory import RunDirectory
from fastgrpo.records.evaluations import PREFIX


def closing_words(summary: Mapping[str, Any], run: RunDirectory) -> list[str]:
    """Lines of what ``summary.json`` and the directory hold; none of an evaluation where there was none."""
    first, last = summary["first_evaluation"], summary["last_evaluation"]
    # else the model is beside itself
    has_changed = bool(first) and first["iteration"] != last["iteration"]
    return [*_scores(summary), *_best(summary, run), *_to_open(run, has_changed)]


def _scores(summary: Mapping[str, Any]) -> list[str]:
    first, last = summary["first_evaluation"], summary["last_evaluation"]
    if not first or first["iteration"] == last["iteration"]:
        return []
    names = [name for name in last if name.startswith(PREFIX) and None not in (first.get(name), last[name])]
    width = max((len(name) for name in names), default=0) - len(PREFIX)
    lines = []
    for name in names:
        short = name.removeprefix(PREFIX)
        found = summary["differences"].get(short, {})
        error = found.get("standard_error")
        line = f"{short:<{width}}  {first[name]:.3f} -> {last[name]:.3f}  {last[name] - first[name]:+.3f}"
        if error is not None:
            line += f" ± {error:.3f}, {found['rose']} prompts up, {found['fell']} down"
        lines.append(line)
    return ["evaluation before and after, on held-out prompts:", *(f"  {line}" for line in lines)] if lines else []


def _best(summary: Mapping[str, Any], run: RunDirectory) -> list[str]:
    best, last = summary["best_evaluation"], summary["last_evaluation"]
    if not best:
        return []
    if best["iteration"] == last["iteration"]:
        is_only_one = last["iteration"] == summary["first_evaluation"]["iteration"]
        return [] if is_only_one else ["the last evaluation is the best one"]
    scores = ", ".join(f"{name.removeprefix(PREFIX)} {best[name]:.3f}" for name in best if name.startswith(PREFIX))
    step = run.checkpoints / f"step_{best['iteration']:06d}"
    where = f"in {step}" if step.is_dir() else "before training" if best["iteration"] == 0 else "no longer saved"
    return [f"best evaluation: iteration {best['iteration']}, {scores}, {where}"]


def _to_open(run: RunDirectory, has_changed: bool) -> list[str]:
    offered: list[tuple[Path, str]] = [
        (run.report, "everything on one page"),
        *([(run.images / "before_after.png", "what changed")] if has_changed else []),
        (run.curves, "how it went"),
        (run.summary, "all of it in numbers"),
    ]
    return ["open:", *(f"  {path}  {why}" for path, why in offered if path.exists())]
