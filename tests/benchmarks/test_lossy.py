"""``benchmarks.lossy`` tells drift from none, and what it reports of each option is true of a small run."""

import argparse
import math

import pytest
import torch

from benchmarks.decode_drift import decode_drift, median_ratio, pixel_drift
from benchmarks.lossy import EMBEDDED, EXACT, OPTIONS, Bench


def test_drift_of_pixels_by_hand() -> None:
    exact = torch.zeros(1, 3, 2, 2)
    images = exact.clone()
    images[0, 0, 0, 0] = 0.6
    # 0.36 / 12 = 0.03
    drift = pixel_drift(images, exact)
    assert drift["rms"] == pytest.approx(math.sqrt(0.03))
    assert drift["psnr"] == pytest.approx(-10 * math.log10(0.03))
    assert pixel_drift(exact, exact) == {"rms": 0.0, "psnr": math.inf}


def test_a_speed_is_the_median_of_the_rounds() -> None:
    assert median_ratio([2.0, 3.0, 8.0], [1.0, 3.0, 2.0]) == 2.0


@pytest.mark.slow
def test_options_drift_less_than_other_noise_and_leave_the_ratio_alone() -> None:
    arguments = argparse.Namespace(full=False, prompts=2, group=3)
    facts = Bench(arguments, "flow_grpo_fast", 2.5, (1, 2, 3))(rounds=1)
    assert list(facts) == [*OPTIONS, "other noise"]
    assert facts[EXACT]["rms"] == 0
    assert facts[EXACT]["rank"] == pytest.approx(1.0)
    assert facts[EXACT]["speed"] == 1
    for option in OPTIONS:
        assert facts[option]["ratio_deviation"] == 0
        if option != EXACT:
            assert 0 < facts[option]["rms"] < facts["other noise"]["rms"] / 2


def test_without_guidance_nothing_of_it_is_cached() -> None:
    arguments = argparse.Namespace(full=False, prompts=1, group=2)
    bench = Bench(arguments, "flow_grpo_fast", 1.0, (1, 2, 3))
    assert set(OPTIONS) - set(bench.options()) == {"solver=cached_guidance"}


def test_half_precision_decoding_drifts_by_less_than_a_grey_level() -> None:
    drift = decode_drift(EMBEDDED, rounds=1, batch=8)
    assert 0 < drift["rms"] < 1 / 255 < drift["contrast"]
