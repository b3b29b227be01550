"""Timings of rewards as tables, and beside the goals they are for."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.report import table
from benchmarks.rewards.case import PIL_BATCHED
from benchmarks.rewards.timing import Result

_TIMES_EAGER, _EAGER = 2.0, "eager_float16"
_COMPILED = ("inductor_float16", "tensorrt_float16")
_PREPROCESSING = 0.03
_HEADER = ["variant", "images/s", "x one by one", "x PIL batched", "preprocessing", "difference", "MB"]


def to_dict(result: Result) -> dict[str, Any]:
    facts = {name: getattr(result, name) for name in ("reward", "model", "shape", "baseline", "refused")}
    return facts | {"seconds": {name: asdict(timing) for name, timing in result.timings.items()}}


def summary(results: Sequence[Result]) -> str:
    """One table a reward, and below it what could not be measured."""
    parts = []
    for result in results:
        rows = [_row(result, name) for name in result.timings]
        missing = "".join(f"\n- {name} not measured: {reason}" for name, reason in result.refused.items())
        parts.append(
            f"## {result.reward}: {result.model}; images {list(result.shape)}\n\n"
            + table(_HEADER, rows)
            + ("\n" + missing if missing else "")
        )
    return "\n\n".join(parts)


def _row(result: Result, name: str) -> list[str]:
    timing, speed = result.timings[name], result.images_per_second(name)
    share = result.preprocessing_share(name)
    others = [than if than in result.timings else None for than in (result.baseline, PIL_BATCHED)]
    return [
        name,
        f"{speed.median:.3g} [{speed.lower:.3g}, {speed.upper:.3g}]",
        *(f"{result.times_faster(name, than):.2f}" if than and len(result.timings) > 1 else "-" for than in others),
        "-" if share is None else f"{share:.1%}",
        f"{timing.difference:.1e}",
        f"{timing.peak_bytes / 1e6:.0f}" if timing.peak_bytes else "-",
    ]


def goals(results: Sequence[Result]) -> list[str]:
    """What was measured on a GPU, beside what was aimed at."""
    lines = []
    for result in results:
        for name in _COMPILED:
            if name in result.timings and _EAGER in result.timings:
                ratio = result.times_faster(name, _EAGER)
                lines.append(
                    f"{result.reward}: {name} is {ratio:.2f}x {_EAGER} at batch {result.shape[0]} "
                    f"(goal: at least {_TIMES_EAGER:g}x at 64 and above)."
                )
        shares = {name: result.preprocessing_share(name) for name in result.timings}
        known = [share for share in shares.values() if share is not None]
        if known:
            lines.append(
                f"{result.reward}: preprocessing is {min(known):.1%} to {max(known):.1%} of its variants' time "
                f"(goal: under {_PREPROCESSING:.0%})."
            )
    return lines
