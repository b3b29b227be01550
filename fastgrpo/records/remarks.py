"""What the user of a run should be told about it: that it does not learn, or is about to break, and the likely reasons.

It is read off the rows of metrics.jsonl, so the progress line and summary.json say the same.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

# one such iteration may be chance
IN_A_ROW = 2
# rows that a remark is made of: the last ones, and those that these are compared with
LOOKS_BACK = 50
# runs of the embedded model that collapsed had such a rise of drift first, at one learning rate; others had none
DRIFT_RISE = 3.0
_LEAST_BEFORE = 5


class Remark(NamedTuple):
    """``state`` in two words, and why it is so."""

    state: str
    why: str

    def __str__(self) -> str:
        return f"{self.state}: {self.why}"


def remark_on(rows: Sequence[Mapping[str, Any]]) -> Remark | None:
    """What is to be said of the last of some iterations, which need be no more than ``LOOKS_BACK``; None if nothing."""
    training = [row for row in rows if "grad_norm" in row]
    last = training[-IN_A_ROW:]
    if len(last) < IN_A_ROW:
        return None
    if why := _why_not_learning(last):
        return Remark("not learning", why)
    if why := _why_drifting(last, training[-LOOKS_BACK:-IN_A_ROW]):
        return Remark("drifting", why)
    return None


def remarks(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One remark for each stretch of iterations that has one, and when that was."""
    found: list[tuple[int, int, Remark]] = []
    training = [row for row in rows if "grad_norm" in row]
    for end in range(IN_A_ROW, len(training) + 1):
        seen = training[max(0, end - LOOKS_BACK) : end]
        remark, first, last = remark_on(seen), seen[-IN_A_ROW]["iteration"], seen[-1]["iteration"]
        if remark is None:
            continue
        if found and found[-1][1] >= first and found[-1][2].state == remark.state:
            found[-1] = (found[-1][0], last, remark)
        else:
            found.append((first, last, remark))
    return [f"iterations {first} to {last}: {remark}" for first, last, remark in found]


def _why_not_learning(last: Sequence[Mapping[str, Any]]) -> str:
    if all(_is_missing(row["grad_norm"]) for row in last):
        return (
            "loss or gradient was not finite, so no optimizer step was taken: lower train.learning_rate, and look at "
            "the rewards and at the evaluation grids in images/"
        )
    if all(row.get("zero_variance_groups") == 1 for row in last):
        return (
            f"all images of a group had the same reward ({last[-1]['reward/total']:.4g} on average), so there was "
            "nothing to prefer: the reward may be constant on these prompts (too hard, too easy, or clamped), the "
            "images may all be alike or broken (see images/; lower train.learning_rate if they were not at first), or "
            "train.group_size may be too small for a reward that is rarely given"
        )
    if all(row["grad_norm"] == 0 for row in last):
        return (
            "the gradient was 0 although rewards differ: the advantage or the objective of this recipe lets nothing "
            "through; see algorithm.advantage, algorithm.objective and reward.weights"
        )
    return ""


def _why_drifting(last: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]]) -> str:
    known = [rate for row in before if (rate := _drift_rate(row)) is not None]
    seen = [rate for row in last if (rate := _drift_rate(row)) is not None]
    if len(known) < _LEAST_BEFORE or len(seen) < len(last):
        return ""
    usual, least = statistics.median(known), min(seen)
    if usual == 0 or least <= DRIFT_RISE * usual:
        return ""
    # what the usual rate and the least one make of the newest learning rate
    size = last[-1]["learning_rate"] ** 2
    return (
        f"at the same learning rate an iteration moves the policy {least / usual:.1f} times as far as before (drift "
        f"{least * size:.3g}, usual {usual * size:.3g}), as runs do before they collapse: lower train.learning_rate or "
        f"train.updates, or bound it with train.max_drift={2 * usual * size:.2g}"
    )


def _drift_rate(row: Mapping[str, Any]) -> float | None:
    """Drift of a learning rate of 1: a step is as long as its rate, and drift a squared distance.  None if unknown."""
    drift, learning_rate = row.get("drift"), row.get("learning_rate")
    if drift is None or _is_missing(drift) or not learning_rate:
        return None
    return float(drift / learning_rate**2)


def _is_missing(value: float | None) -> bool:
    return value is None or not math.isfinite(value)
