"""``python -m benchmarks.memory_plan``: a case that raises costs its own row, and what is known is written."""

import json
from pathlib import Path

import pytest

from benchmarks import memory_plan, report
from benchmarks.memory_plan import Row, main
from fastgrpo.memory.plan import KEYS


def _row(case: str, compile: str) -> Row:
    return Row(
        case=case, compile=compile, batches=dict.fromkeys(KEYS.values(), 4), stages={}, planned=2**31,
        allocated=2**30, reserved=2**31, memory=2**33, checkpointing=False,
    )  # fmt: skip


def _results(directory: Path) -> tuple[dict[str, list[dict[str, object]]], str]:
    (data,), (page,) = directory.glob("*.json"), directory.glob("*.md")
    return json.loads(data.read_text()), page.read_text()


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "commit", lambda: "c0ffee000")
    return tmp_path / "results"


def test_a_case_that_raises_costs_its_own_row(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(case: str, compile: str) -> Row:
        if case == "flux":
            raise RuntimeError("CUDA | out of memory\nand more")
        return _row(case, compile)

    monkeypatch.setattr(memory_plan, "measure", measure)
    assert main(["nft", "flux", "kl", "--compile", "eager"]) == 1
    told, page = _results(results)
    assert [row["case"] for row in told["rows"]] == ["nft", "kl"]
    assert told["failures"] == [
        {"case": "flux", "compile": "eager", "reason": "RuntimeError: CUDA | out of memory\nand more"}
    ]
    assert "| flux | eager |  |  |  |  |  | RuntimeError: CUDA / out of memory |" in page
    assert "| kl | eager | off | 4, 4, 4 | 2.00 GiB | 1.00 GiB | +100.0% | 2.00 GiB |" in page
    assert main(["nft", "kl", "--compile", "eager"]) == 0
    # also where there is nothing else to say
    assert main(["flux", "--compile", "eager"]) == 1
    assert _results(results)[0]["rows"] == []


def test_what_is_known_is_written_after_each_case(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(case: str, compile: str) -> Row:
        if case == "kl":
            raise KeyboardInterrupt
        return _row(case, compile)

    monkeypatch.setattr(memory_plan, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        main(["nft", "kl", "--compile", "eager"])
    assert [row["case"] for row in _results(results)[0]["rows"]] == ["nft"]
