"""What the benchmarks compute from their measurements, and what a result says of its origin."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import report
from benchmarks.lasting import different_metrics
from benchmarks.noise_influence import start_noise_share
from fastgrpo.records.summary import processor


def test_share_of_the_start_noise_by_hand():
    # two start noises of one prompt, two trajectories each: means 2 and 6, variance 2 within each
    reward_PZE = torch.tensor([[[1.0, 3.0], [5.0, 7.0]]])
    # between: var(2, 6) = 8, less 2 / 2 that the trajectories alone would give
    assert start_noise_share(reward_PZE) == pytest.approx(7 / (7 + 2))


def test_share_is_all_or_nothing_at_the_ends():
    generator = torch.Generator().manual_seed(0)
    start_PZ1 = torch.randn(200, 8, 1, generator=generator)
    trajectory_PZE = torch.randn(200, 8, 4, generator=generator)
    assert start_noise_share(start_PZ1.expand(-1, -1, 4)) == pytest.approx(1.0)
    assert start_noise_share(trajectory_PZE) < 0.05
    assert start_noise_share(start_PZ1 + trajectory_PZE) == pytest.approx(0.5, abs=0.05)


CPUINFO = """\
processor\t: 0
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC

processor\t: 1
cpu family\t: 26
model\t\t: 18
model name\t: another
"""


def test_a_processor_is_named_with_its_family_and_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(CPUINFO)
    assert processor(info) == "AMD EPYC (family 25, model 17)"
    info.write_text("model name: Cortex\n")
    assert processor(info) == "Cortex"
    monkeypatch.setattr("platform.processor", lambda: "i386")
    assert processor(tmp_path / "none") == "i386"


def test_a_result_says_on_what_and_at_which_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = {"gpus": [], "cpu": "AMD EPYC (family 25, model 17)", "cpu_cores": 2}
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "hardware", lambda: machine)
    monkeypatch.setattr(report, "commit", lambda: "0123456789abcdef-dirty")
    monkeypatch.setattr(report.torch.cuda, "is_available", lambda: False)  # type: ignore[attr-defined]
    monkeypatch.setattr("sys.argv", ["", "--write", "/somewhere/on/this/machine", "a b"])
    path = report.write_report("kernels.cubins", title="Cubins", body="None.", data={"found": 3})
    assert path.name.startswith("kernels_cubins_cpu_")
    assert path.name.endswith("_012345678-dirty.md")
    text = path.read_text()
    assert text.startswith("# Cubins\n\nNone.\n\nCommand: `python -m benchmarks.kernels.cubins --write PATH 'a b'`")
    assert "Measured on 2 cores of AMD EPYC (family 25, model 17); commit 012345678-dirty; python 3." in text
    data = json.loads(path.with_suffix(".json").read_text())
    assert (data["theme"], data["found"], data["hardware"]) == ("kernels.cubins", 3, machine)
    monkeypatch.setattr(report, "commit", lambda: None)
    with pytest.raises(ValueError, match="needs the commit it was measured at; run benchmarks from a git checkout"):
        report.write_report("lossy", title="", body="", data={})


def test_runs_are_compared_in_all_metrics_but_time_and_memory(tmp_path: Path) -> None:
    rows = [{"iteration": 1, "loss": 0.5, "kl": 0.1, "seconds/update": 2.0, "peak_bytes": 7}]
    others = [{"iteration": 1, "loss": 0.25, "seconds/update": 3.0, "peak_bytes": 8}, {"iteration": 2, "loss": 0.5}]
    for name, lines in (("one", rows), ("other", others)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert different_metrics(tmp_path / "one", tmp_path / "one") == []
    assert different_metrics(tmp_path / "one", tmp_path / "other") == [
        "kl of iteration 1",
        "loss of iteration 1",
        "iteration of iteration 2",
        "loss of iteration 2",
    ]


def test_a_result_goes_where_the_environment_says_and_takes_its_commit_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "commit", lambda: None)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.delenv("BENCHMARK_COMMIT", raising=False)
    with pytest.raises(ValueError, match="set BENCHMARK_COMMIT"):
        report.write_report("theme", title="Title", body="", data={})
    monkeypatch.setenv("BENCHMARK_COMMIT", "fedcba9876543210")
    written = report.write_report("theme", title="Title", body="", data={})
    assert written.parent == tmp_path
    assert written.stem.endswith("_fedcba987")
