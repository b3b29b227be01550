"""How far two runs of one recipe are apart, and whether the order of their sums explains it.

A metric is measured by its own size, since an absolute limit that holds for all of them sees nothing of the small ones;
weights, the sharpest check, by the way that they went from their beginning.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.lasting import VARYING

WEIGHTS = "weights"


@dataclass(frozen=True)
class Allowed:
    """Largest differences, of metrics relative to their size and of weights to their way, that are rounding."""

    metrics: float
    weights: float


# measured of the tests' model: rounding moves statistics, which are float32 even here, by up to 5e-8 and 1e-5 of their
# size, and weights by 1e-13 and 3e-5 of their way.  A sum of gradients 0.1% too large moves grad_norm by 1e-3, and
# weights in float64 by 7e-5; a lost gradient, or one of another rank's advantages, moves weights by 0.2 and more
ALLOWED = {
    "float64": Allowed(metrics=1e-6, weights=1e-9),
    # of LoRA learning from images: on 4 processes weights were equal to 1e-12 for ten iterations, then parted at once,
    # by 8e-8 after 20.  One number that rounds otherwise would do that, since stored latents and errors are float32 in
    # any model; which one it was has not been traced
    "float64, images": Allowed(metrics=1e-6, weights=1e-6),
    "float32": Allowed(metrics=2e-4, weights=1e-2),
}
# by what else than itself a metric is measured: means of terms of about this size that cancel each other, and what is
# rounding itself, a share of 1
_SIZES = {"loss": 1.0, "search/rank_correlation": 1.0, "velocity_deviation": 1.0}


@dataclass(frozen=True)
class Run:
    """The metrics of each iteration, and the trained weights by name, before and after."""

    rows: Sequence[Mapping[str, Any]]
    began: Mapping[str, Tensor]
    ended: Mapping[str, Tensor]


def beyond_rounding(found: Mapping[str, float], dtype: str) -> dict[str, float]:
    """Those of ``differences`` that the order of sums does not explain."""
    allowed = ALLOWED[dtype]
    limits = {key: allowed.weights if key == WEIGHTS else allowed.metrics for key in found}
    return {key: difference for key, difference in found.items() if not difference <= limits[key]}


def differences(alone: Run, other: Run) -> dict[str, float]:
    """The largest difference in each metric, relative to its size in ``alone``, and in the weights, to their way."""
    return metric_differences(alone.rows, other.rows) | {WEIGHTS: _weight_difference(alone, other)}


def metric_differences(alone: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """By metric, timings and memory aside; infinite where only one of them has it or it is no number."""
    if [row["iteration"] for row in alone] != [row["iteration"] for row in other]:
        return {"iteration": math.inf}
    pairs: dict[str, list[tuple[Any, Any]]] = {}
    for a, b in zip(alone, other, strict=True):
        for key in a.keys() | b.keys():
            if not key.startswith(VARYING):
                pairs.setdefault(key, []).append((a.get(key), b.get(key)))
    return {key: _relative(pairs[key], _SIZES.get(key, 0.0)) for key in sorted(pairs)}


def _relative(pairs: Sequence[tuple[Any, Any]], size: float) -> float:
    """The largest |a - b|, relative to the largest |a|, or to ``size`` where that is given."""
    unequal = [(a, b) for a, b in pairs if a != b]
    if not all(isinstance(number, int | float) and math.isfinite(number) for pair in unequal for number in pair):
        return math.inf
    size = size or max(abs(a) for a, _ in pairs if isinstance(a, int | float))
    return max((abs(a - b) / size if size else math.inf for a, b in unequal), default=0.0)


def _weight_difference(alone: Run, other: Run) -> float:
    if alone.ended.keys() != other.ended.keys():
        return math.inf
    way = _root_mean_square([weight - alone.began[name] for name, weight in alone.ended.items()])
    apart = max(_root_mean_square([weight - other.ended[name]]) for name, weight in alone.ended.items())
    return apart / way if way else math.inf


def _root_mean_square(tensors: Sequence[Tensor]) -> float:
    return torch.cat([tensor.double().flatten() for tensor in tensors]).square().mean().sqrt().item()
