"""Seconds of stages add up, and an error inside a stage comes through."""

import time

import pytest
import torch

from fastgrpo.profiling.timing import WAIT, StageTimer, inner_stage, waiting


def test_stages_add_up_within_the_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    timer = StageTimer(torch.device("cpu"))
    for stage, seconds in (("rollout", 2.0), ("update", 3.0), ("rollout", 0.5)):
        with timer(stage):
            now[0] += seconds
        now[0] += 0.25
    assert timer.seconds() == {"iteration": 6.25, "rollout": 2.5, "update": 3.0}


def test_a_stage_within_another_has_its_time_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    # where nobody counts
    with inner_stage("search"):
        now[0] += 1.0
    timer = StageTimer(torch.device("cpu"))
    with timer("search"):
        now[0] += 0.5
    with timer("rollout"):
        now[0] += 2.0
        with inner_stage("search"):
            now[0] += 4.0
            with waiting():
                now[0] += 0.25
        now[0] += 8.0
    with timer("update"):
        now[0] += 16.0
    assert timer.seconds() == {
        "iteration": 30.75,
        "search": 4.75,
        "rollout": 10.0,
        "update": 16.0,
        WAIT + "search": 0.25,
    }


def test_an_error_inside_a_stage_comes_through() -> None:
    timer = StageTimer(torch.device("cpu"))

    def fail() -> None:
        with timer("reward"):
            raise KeyError("inside")

    with pytest.raises(KeyError):
        fail()


@pytest.mark.gpu
def test_a_stage_on_the_gpu_counts_the_work_of_the_gpu() -> None:
    device = torch.device("cuda")
    x = torch.randn(4096, 4096, device=device)
    torch.cuda.synchronize()
    timer = StageTimer(device)
    start = time.perf_counter()
    with timer("update"):
        for _ in range(20):
            x = x @ x / 64
    seconds = timer.seconds()
    elapsed = time.perf_counter() - start
    assert 0 < seconds["update"] <= seconds["iteration"] <= elapsed * 1.05
    # 20 products of 2 * 4096^3 operations: no device does them in under 0.5 ms
    assert seconds["update"] > 5e-4
