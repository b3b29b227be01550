"""What is chosen by the base model's success, from counts by hand and from those of the result."""

import json
from pathlib import Path

import pytest

from benchmarks.rare_success.chosen import BANDS, NUM_HARD, choose_bands, choose_hard
from benchmarks.rare_success.counts import Counts, wilson
from benchmarks.rare_success.written import BANDS_FILE
from benchmarks.report import RESULTS
from fastgrpo.shapes.captions import held_out_captions, training_captions
from fastgrpo.shapes.hard_captions import hard_candidates, hard_captions


@pytest.fixture(scope="module")
def result() -> dict:
    (path,) = RESULTS.glob("rare_success_success_cpu_*.json")
    return json.loads(path.read_text())


def test_wilson_by_hand() -> None:
    # none of n: z^2 / (n + z^2)
    assert wilson(0, 100) == (0.0, pytest.approx(3.8414588 / 103.8414588))
    assert wilson(5, 10) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))


def test_counts_are_added_over_measurements_and_never_twice(tmp_path: Path) -> None:
    counts = Counts().with_more({"a": (1, 4)}, "x").with_more({"b": (0, 4)}, "x").with_more({"a": (2, 8)}, "y")
    assert counts.total == {"a": (3, 12), "b": (0, 4)}
    counts.write(tmp_path / "counts.json")
    assert Counts.read(tmp_path / "counts.json") == counts
    assert Counts.read(tmp_path / "none.json") == Counts()
    with pytest.raises(ValueError, match="'x' has 'a' already; measure with another --seed"):
        counts.with_more({"a": (0, 4)}, "x")


def test_hard_prompts_lie_below_one_percent_and_those_that_ever_succeed_come_first() -> None:
    candidates = [str(caption) for caption in hard_candidates()]
    chain = [text for text in candidates if text.count("above") + text.count("left of") == 2]
    once, often = chain[-1], chain[0]
    totals = dict.fromkeys(candidates, (0, 400)) | {once: (1, 400), often: (4, 400)}
    train, held_out = ([str(caption) for caption in part] for part in choose_hard(totals))
    assert once in train + held_out
    assert often not in train + held_out
    assert len(train) == sum(number for number, _ in NUM_HARD.values())
    assert len(held_out) == sum(number for _, number in NUM_HARD.values())
    assert not set(train) & set(held_out)
    # what was never measured is no hard prompt
    del totals[once]
    assert once not in {str(caption) for part in choose_hard(totals) for caption in part}
    with pytest.raises(ValueError, match="only 0 captions of form '4 equal objects' lie below 1%"):
        choose_hard({})


def test_bands_hold_training_prompts_of_their_rates() -> None:
    easy = [str(caption) for caption in training_captions()]
    rates = dict(zip(easy, [1, 5, 19, 20, 49, 50] * 40, strict=False))
    totals = {str(caption): (0, 100) for caption in hard_candidates()} | {text: (n, 100) for text, n in rates.items()}
    totals |= {str(caption): (3, 100) for caption in held_out_captions()}
    bands = choose_bands(totals)
    assert list(bands) == list(BANDS)
    assert [len(found) for found in bands.values()] == [24, 24, 24, 24]
    assert {rates[text] for text in bands["1-5%"]} == {1}
    assert {rates[text] for text in bands["5-20%"]} == {5, 19}
    assert {rates[text] for text in bands["20-50%"]} == {20, 49}
    assert set(bands["<1%"]) <= {str(caption) for caption in choose_hard(totals)[0]}


def test_prompt_files_and_bands_are_those_of_the_result(result: dict) -> None:
    totals = Counts.of(result["measurements"]).total
    assert {text: tuple(count) for text, count in result["totals"].items()} == totals
    assert choose_hard(totals) == hard_captions()
    assert choose_bands(totals) == result["bands"] == json.loads(BANDS_FILE.read_text())
    assert all(totals[str(caption)][0] < 0.01 * totals[str(caption)][1] for part in hard_captions() for caption in part)
