"""The evaluations of a run: which of them is best, and by how much the last one differs from the first.

``evaluations.jsonl`` has one object an evaluation, ``{"iteration": n, "means": {name: [P numbers]}}``.  Prompts and
noise are the same each time, so two evaluations are compared prompt by prompt: the standard error of their difference
is std(differences) / sqrt(P).  Letters: P prompts, G images of each.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

# the table of runs is not to wait for torch
if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "eval/"
Row = TypeVar("Row", bound=Mapping[str, Any])


def evaluated(rows: Sequence[Row]) -> list[Row]:
    """Those of the rows of metrics.jsonl that have an evaluation."""
    return [row for row in rows if any(name.startswith(PREFIX) for name in row)]


def total(row: Mapping[str, Any], weights: Mapping[str, float]) -> float | None:
    """What is maximised, on the evaluation's prompts: the weighted sum of its scores; None where one is missing."""
    scores = [(weight, row.get(f"{PREFIX}{name}")) for name, weight in weights.items()]
    if not scores or any(score is None for _, score in scores):
        return None
    value = sum(weight * score for weight, score in scores if score is not None)
    return value if math.isfinite(value) else None


def totals(scores: Mapping[str, Sequence[float]], weights: Mapping[str, float]) -> list[float] | None:
    """The weighted sum for each of some images, from the scores of each; None where a term or a number is missing."""
    if not weights or weights.keys() - scores.keys():
        return None
    of_images = zip(*(scores[name] for name in weights), strict=True)
    sums = [sum(w * s for w, s in zip(weights.values(), of_one, strict=True)) for of_one in of_images]
    return sums if all(map(math.isfinite, sums)) else None


def weights_of(config: Mapping[str, Any]) -> dict[str, float]:
    """The weights of the rewards of a run's config, as plain data; none of a config that has none."""
    reward = config.get("reward")
    weights = reward.get("weights") if isinstance(reward, Mapping) else None
    return dict(weights) if isinstance(weights, Mapping) else {}


def best(rows: Sequence[Row], weights: Mapping[str, float]) -> Row | None:
    """The row of the evaluation with the largest total, of equal ones the first; None where there is none."""
    known = [(value, row) for row in rows if (value := total(row, weights)) is not None]
    return max(known, key=lambda pair: pair[0])[1] if known else None


def means_of_prompts(iteration: int, scores: "Mapping[str, Tensor]") -> dict[str, Any]:
    """The line of ``evaluations.jsonl`` for an evaluation with these scores [P, G]; no number is null."""
    means = {name: scores_PG.double().mean(dim=1).tolist() for name, scores_PG in scores.items()}
    finite = {name: [value if math.isfinite(value) else None for value in of_P] for name, of_P in means.items()}
    return {"iteration": iteration, "means": finite}


def differences(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """By score, the last evaluation minus the first, its standard error, and how many prompts rose and fell.

    Empty where there are fewer than two of the same number of prompts.
    """
    if len(lines) < 2:
        return {}
    before, after = lines[0]["means"], lines[-1]["means"]
    found = {}
    for name in [name for name in after if name in before and len(before[name]) == len(after[name])]:
        pairs = [(a, b) for a, b in zip(before[name], after[name], strict=True) if a is not None and b is not None]
        if not pairs:
            continue
        of_P = [b - a for a, b in pairs]
        error = statistics.stdev(of_P) / math.sqrt(len(of_P)) if len(of_P) > 1 else None
        found[name] = {
            "difference": statistics.fmean(of_P),
            "standard_error": error,
            "rose": sum(value > 0 for value in of_P),
            "fell": sum(value < 0 for value in of_P),
        }
    return found
