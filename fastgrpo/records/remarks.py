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
# runs of the embedded model that collapsed had such a rise of drift first, those that did not had none
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
    known = [row["drift"] for row in before if not _is_missing(row.get("drift"))]
    if len(known) < _LEAST_BEFORE or any(_is_missing(row.get("drift")) for row in last):
        return ""
    usual, least = statistics.median(known), min(row["drift"] for row in last)
    if least <= DRIFT_RISE * usual:
        return ""
    return (
        f"an iteration moves the policy {least / usual:.1f} times as far from itself as before (drift {least:.3g}, "
        f"median {usual:.3g}), as runs do before they collapse: lower train.learning_rate or train.updates, or bound "
        f"it with train.max_drift={2 * usual:.2g}"
    )


def _is_missing(value: float | None) -> bool:
    return value is None or not math.isfinite(value)
