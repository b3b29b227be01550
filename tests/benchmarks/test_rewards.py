"""The benchmarks of the rewards: every variant runs and agrees, one that does not is refused, figures are by hand."""

from dataclasses import replace

import pytest
import torch

from benchmarks import ocr_pictures
from benchmarks.kernels.timing import Quartiles, host_clock
from benchmarks.ocr_pictures import samples
from benchmarks.ocr_reward import grades
from benchmarks.rewards.__main__ import main
from benchmarks.rewards.case import BACKENDS, ONE_BY_ONE, PIL_BATCHED, REWARDS, make_case
from benchmarks.rewards.results import goals, summary
from benchmarks.rewards.timing import Result, Timing, run_case
from fastgrpo.rewards.ocr import wanted_text

CPU = torch.device("cpu")
# seconds each: torch.compile's are minutes
UNCOMPILED = ["eager_float32", "eager_bfloat16"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is missing here may be there")
def test_all_rewards_run_in_miniature_and_what_is_missing_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["--miniature", "--repeats", "2", "--backends", *UNCOMPILED, "tensorrt_float16"]
    main([*quick, "--rewards", *(reward for reward in REWARDS if reward != "ocr")])
    # it reads for a good part of a second
    main([*quick, "--rewards", "ocr", "--batch", "1"])
    told = capsys.readouterr().out
    assert all(f"## {reward}: " in told for reward in REWARDS)
    num_networks = sum(reward not in ("shapes", "jpeg", "ocr") for reward in REWARDS)
    assert told.count("| eager_bfloat16 |") == told.count("| pil_one_by_one |") == num_networks
    assert told.count("tensorrt_float16 not measured: ValueError: torch_tensorrt cannot be imported") == num_networks
    assert "nothing here is a result" in told


def test_scores_that_differ_are_refused_with_the_difference_and_the_others_go_on() -> None:
    case = make_case("aesthetic", ["eager_float32"], 2, CPU, miniature=True)
    right = case.variants["eager_float32"]()
    wrong = lambda: lambda images_BCHW, prompts: 1.5 * right(images_BCHW, prompts)  # noqa: E731
    result = run_case(replace(case, variants={**case.variants, "wrong": wrong}), host_clock, repeats=2)
    assert result.refused.keys() == {"wrong"}
    assert "wrong differs by" in result.refused["wrong"]
    assert result.timings.keys() == {ONE_BY_ONE, PIL_BATCHED, "eager_float32"}
    assert "wrong not measured: ValueError" in summary([result])


def test_a_baseline_that_fails_ends_the_benchmark() -> None:
    case = make_case("jpeg", [], 1, CPU, miniature=True)

    def fail() -> None:
        raise ValueError("no scores")

    with pytest.raises(ValueError, match="no scores"):
        run_case(replace(case, variants={case.baseline: fail}), host_clock, repeats=2)  # type: ignore[dict-item]


def timing(whole: float, preprocessing: float | None = None) -> Timing:
    parts = [None if one is None else Quartiles(one, 0.5 * one, 2 * one) for one in (whole, preprocessing)]
    assert parts[0] is not None
    return Timing(parts[0], parts[1], difference=0.0, peak_bytes=0)


def test_speeds_and_shares_by_hand() -> None:
    timings = {
        ONE_BY_ONE: timing(12.0),
        PIL_BATCHED: timing(6.0),
        "eager_float16": timing(4.0, 0.02),
        "inductor_float16": timing(1.6, 0.08),
    }
    result = Result("hps", "CLIP-H", (64, 3, 512, 512), ONE_BY_ONE, timings)
    assert result.images_per_second("inductor_float16") == Quartiles(40.0, 20.0, 80.0)
    assert result.times_faster("inductor_float16", ONE_BY_ONE) == pytest.approx(7.5)
    assert result.preprocessing_share("inductor_float16") == pytest.approx(0.05)
    assert result.preprocessing_share(ONE_BY_ONE) is None
    compiled, preprocessing = goals([result])
    assert "inductor_float16 is 2.50x eager_float16 at batch 64" in compiled
    assert "0.5% to 5.0% of its variants' time (goal: under 3%)" in preprocessing
    assert "| inductor_float16 | 40 [20, 80] | 7.50 | 3.75 | 5.0% |" in summary([result])


def test_every_backend_has_a_name_that_says_its_dtype() -> None:
    for name in BACKENDS.keys() - {"tensorrt_float16"}:
        assert str(BACKENDS[name](4).dtype_on(torch.device("cpu"))) == f"torch.{name.split('_')[1]}"


def test_expected_ocr_rewards_are_those_of_the_spelling(monkeypatch: pytest.MonkeyPatch) -> None:
    # how large they are is nothing to their spelling
    monkeypatch.setattr(ocr_pictures, "SIZE", 16)
    for seed in range(20):
        exact, one, two, missing, noise, blank = samples(seed)
        length = len(wanted_text(exact.prompt))
        assert (exact.expected, noise.expected, blank.expected) == (1.0, 0.0, 0.0)
        assert one.expected == pytest.approx(1 - 1 / length)
        assert two.expected == pytest.approx(1 - 2 / length)
        assert 0 < missing.expected < two.expected


def test_ocr_rewards_are_compared_with_what_is_expected_by_hand() -> None:
    drawn = [sample for seed in range(2) for sample in samples(seed) if sample.kind in ("exact", "noise")]
    exact, noise = grades(drawn, [1.0, 0.0, 0.5, 0.0], "as drawn")
    assert exact == {"view": "as drawn", "kind": "exact", "mean": 0.75, "expected": 1.0, "exactly_expected": 0.5}
    assert noise["exactly_expected"] == 1.0
