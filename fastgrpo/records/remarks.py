"""What the user of a run should be told about it: that it does not learn, and the likely reasons.

It is read off the rows of metrics.jsonl, so the progress line and summary.json say the same.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

# one such iteration may be chance
IN_A_ROW = 2


def not_learning(rows: Sequence[Mapping[str, Any]]) -> str:
    """Why the last iterations cannot have taught anything; empty if they can, or if there are not enough of them."""
    last = [row for row in rows if "grad_norm" in row][-IN_A_ROW:]
    if len(last) < IN_A_ROW:
        return ""
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


def remarks(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One remark for each stretch of iterations that could not learn, and when that was."""
    found: list[tuple[int, int, str]] = []
    training = [row for row in rows if "grad_norm" in row]
    for end in range(IN_A_ROW, len(training) + 1):
        pair = training[end - IN_A_ROW : end]
        why, first, last = not_learning(pair), pair[0]["iteration"], pair[-1]["iteration"]
        if why and found and found[-1][1] >= first:
            found[-1] = (found[-1][0], last, why)
        elif why:
            found.append((first, last, why))
    return [f"iterations {first} to {last}: {why}" for first, last, why in found]


def _is_missing(value: float | None) -> bool:
    return value is None or not math.isfinite(value)
