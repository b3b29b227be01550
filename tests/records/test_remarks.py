"""A run that cannot learn says so: from rows as metrics.jsonl has them, in the progress line and in the summary."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from torch import Tensor

from fastgrpo.records.progress import Progress
from fastgrpo.records.remarks import Remark, remark_on, remarks
from fastgrpo.training import train
from tests.tiny_config import make_config

GOOD = {"grad_norm": 0.3, "zero_variance_groups": 0.5, "reward/total": 0.4}
EQUAL = {"grad_norm": 0.0, "zero_variance_groups": 1.0, "reward/total": 0.0}
BROKEN = {"grad_norm": None, "zero_variance_groups": 0.0, "reward/total": 0.0}
STILL = {"grad_norm": 0.0, "zero_variance_groups": 0.0, "reward/total": 0.4}


def rows_of(*kinds: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"iteration": 0, "eval/a": 1.0}, *({"iteration": i} | kind for i, kind in enumerate(kinds, start=1))]


@pytest.mark.parametrize(
    ("kinds", "says"),
    [
        ((EQUAL,), ""),
        ((EQUAL, GOOD), ""),
        ((GOOD, EQUAL, EQUAL), "all images of a group had the same reward"),
        ((GOOD, BROKEN, BROKEN), "not finite, so no optimizer step was taken: lower train.learning_rate"),
        ((STILL, STILL), "the gradient was 0 although rewards differ"),
        # with a penalty there is a gradient, and still nothing to prefer
        ((EQUAL | {"grad_norm": 0.1}, EQUAL | {"grad_norm": 0.1}), "all images of a group had the same reward"),
        ((BROKEN, EQUAL), ""),
        ((EQUAL, EQUAL, GOOD), ""),
    ],
)
def test_two_iterations_in_a_row_without_a_gradient_are_remarked_on(kinds: tuple[dict, ...], says: str) -> None:
    remark = remark_on(rows_of(*kinds))
    assert says in str(remark)
    assert (remark is not None) == bool(says)
    assert remark is None or remark.state == "not learning"


def drifts(*values: float | None, learning_rates: Sequence[float] = ()) -> list[dict[str, Any]]:
    rates = learning_rates or [1e-3] * len(values)
    return rows_of(
        *({**GOOD, "drift": value, "learning_rate": rate} for value, rate in zip(values, rates, strict=True))
    )


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (
            (1e-3, 2e-3, 1e-3, 2e-3, 1e-3, 3.1e-3, 4e-3),
            "3.1 times as far as before (drift 0.0031, usual 0.001)",
        ),
        # exactly three times, one of two, a rise that is over, too few to compare with, and a share of numbers
        ((1e-3, 2e-3, 1e-3, 2e-3, 1e-3, 3e-3, 4e-3), ""),
        ((1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 9e-3), ""),
        ((1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 9e-3, 1e-3), ""),
        ((1e-3, 1e-3, 1e-3, 1e-3, 9e-3, 9e-3), ""),
        ((1e-3, 1e-3, 1e-3, 1e-3, 1e-3, None, 9e-3), ""),
        # sparse rewards, or train.max_drift, leave iterations without a way from the old policy
        ((0.0, 0.0, 0.0, 0.0, 0.0, 1e-4, 2e-4), ""),
    ],
)
def test_a_rise_of_drift_is_remarked_on_in_time(values: tuple[float | None, ...], says: str) -> None:
    remark = remark_on(drifts(*values))
    assert (remark is not None) == bool(says)
    if remark is not None:
        assert remark.state == "drifting"
        assert says in remark.why
        assert remark.why.endswith("bound it with train.max_drift=0.002")


def test_drift_is_compared_at_one_learning_rate() -> None:
    # of a warm-up it grows as the square of the rate
    rates = [1e-4 * n for n in range(1, 11)]
    assert remarks(drifts(*(1e3 * rate**2 for rate in rates), learning_rates=rates)) == []
    # and when the rate has fallen, as much as before is too much
    fallen = [1e-3] * 8 + [5e-4] * 2
    remark = remark_on(drifts(*[1e-3] * 10, learning_rates=fallen))
    assert remark is not None
    assert "4.0 times as far as before (drift 0.001, usual 0.00025)" in remark.why
    assert remark.why.endswith("bound it with train.max_drift=0.0005")
    # a rate of 0 moves nothing
    assert remarks(drifts(*[1e-3] * 8, 0.0, 0.0, learning_rates=[1e-3] * 8 + [0.0] * 2)) == []


def test_drift_is_compared_with_the_last_fifty_rows_alone() -> None:
    # begun high: only what is left of it in the last fifty counts
    high, low = [1e-2] * 60, [1e-3] * 46
    assert remark_on(drifts(*high, *low, 4e-3, 4e-3)) is not None
    assert remark_on(drifts(*high, *low[:20], 4e-3, 4e-3)) is None
    assert [str(r).split(":")[0] for r in remarks(drifts(*low, 4e-3, 4e-3, 4e-3, 1e-3))] == ["iterations 47 to 49"]


def test_each_stretch_is_one_remark_that_says_when() -> None:
    found = remarks(rows_of(GOOD, EQUAL, EQUAL, EQUAL, GOOD, GOOD, BROKEN, BROKEN, GOOD))
    assert [remark.split(": ")[:2] for remark in found] == [
        ["iterations 2 to 4", "not learning"],
        ["iterations 7 to 8", "not learning"],
    ]
    assert remarks(rows_of(GOOD, EQUAL, GOOD, EQUAL, GOOD)) == []


def test_the_line_says_it_once_in_full_and_in_short_until_it_is_over() -> None:
    file = io.StringIO()
    with Progress(5, every=1, console=Console(file=file, width=200)) as progress:
        why = Remark("not learning", "why")
        for iteration, remark in enumerate((None, why, why._replace(why="again"), None), start=1):
            progress.remark(remark)
            progress.update(iteration, {})
    lines = file.getvalue().splitlines()
    assert [line for line in lines if line.startswith("not learning: ")] == ["not learning: why"]
    assert ["not learning" in line for line in lines if line.startswith("iteration")] == [False, True, True, False]


def constant(images_BCHW: Tensor, prompts: list[str]) -> Tensor:
    return images_BCHW.new_full((len(prompts),), 0.25)


def test_a_run_with_a_constant_reward_says_so_where_its_user_looks(
    tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("reward=custom", "reward.path=tests.records.test_remarks.constant", "reward.golden=false")
    output = train(make_config(tiny_weights, tmp_path / "run", *settings, "algorithm.objective.kl_coef=0.0"))
    shown = capsys.readouterr().out
    assert "not learning: all images of a group had the same reward (0.25 on average)" in " ".join(shown.split())
    (remark,) = json.loads((output / "summary.json").read_text())["remarks"]
    assert remark.startswith(
        "iterations 1 to 2: not learning: all images of a group had the same reward (0.25 on average)"
    )
