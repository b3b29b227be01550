"""The profile of a run: FLOPs by hand and beside PyTorch's counter, shares that add up, the files that it leaves."""

import gzip
import json
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from fastgrpo.profiling.flops import StageFlops, matmul_ceiling
from fastgrpo.profiling.profile import Profile, page, unprofiled
from fastgrpo.profiling.timing import NO_STAGE, StageTimer, running_stage
from fastgrpo.profiling.trace import MATRIX, MEMORY, OTHER, StageTrace, Trace, kernel_class, read_trace
from fastgrpo.training import train
from tests.tiny_config import make_config

CPU = torch.device("cpu")


def test_flops_of_a_matrix_product_and_its_backward_by_hand() -> None:
    timer = StageTimer(CPU)
    x, weight = torch.randn(6, 5), torch.randn(5, 7, requires_grad=True)
    with StageFlops() as flops:
        with timer("forward"):
            y = x @ weight
        with timer("backward"):
            y.sum().backward()
        torch.randn(3, 4) @ torch.randn(4, 2)
    # the gradient of the weight alone: x asks for none
    assert flops.by_stage == {"forward": 2 * 6 * 5 * 7, "backward": 2 * 6 * 5 * 7, NO_STAGE: 2 * 3 * 4 * 2}


def test_flops_of_a_network_are_those_of_pytorchs_counter_and_of_its_attention_by_hand() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(64, 5)
    )
    x = torch.randn(2, 3, 4, 4)
    with FlopCounterMode(display=False) as expected:
        network(x).sum().backward()
    with StageFlops() as flops:
        network(x).sum().backward()
    assert sum(flops.by_stage.values()) == expected.get_total_flops() > 0
    q, k, v = (torch.randn(2, 3, length, 16, requires_grad=True) for length in (10, 12, 12))
    with StageFlops() as flops:
        seen = nn.functional.scaled_dot_product_attention(q, k, v)
    product = 2 * 2 * 3 * 10 * 12 * 16
    assert flops.by_stage == {NO_STAGE: 2 * product}
    with StageFlops() as flops:
        seen.sum().backward()
    # scores once more, and two products for each of the forward's
    assert flops.by_stage == {NO_STAGE: 5 * product}


def test_the_running_stage_ends_with_its_block_also_when_that_fails() -> None:
    timer = StageTimer(CPU)
    with timer("rollout"):
        assert running_stage() == "rollout"
    with pytest.raises(ZeroDivisionError), timer("update"):
        raise ZeroDivisionError
    assert running_stage() == NO_STAGE


def test_no_machine_multiplies_faster_than_its_ceiling_by_much() -> None:
    first, second = torch.randn(256, 256), torch.randn(256, 256)
    ceiling = matmul_ceiling(CPU, torch.float32)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        first @ second
    (product,) = [event for event in profiler.events() if event.name == "aten::mm"]
    assert 1e8 < 2 * 256**3 / (product.self_cpu_time_total / 1e6) < 5 * ceiling


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("aten::addmm", MATRIX),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", MATRIX),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", MATRIX),
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNN", MATRIX),
        ("void cutlass::device_kernel<flash::enable_sm90>", MATRIX),
        ("aten::copy_", MEMORY),
        ("aten::native_layer_norm", MEMORY),
        ("triton_poi_fused_add_mul_3", MEMORY),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add>", MEMORY),
        ("_sde_step_kernel", MEMORY),
        ("Memcpy DtoD (Device -> Device)", MEMORY),
        ("aten::view", OTHER),
        ("aten::empty", OTHER),
    ],
)
def test_kernels_are_classified_by_their_names(name: str, expected: str) -> None:
    assert kernel_class(name) == expected


def test_a_trace_on_the_cpu_knows_stages_classes_and_syncs() -> None:
    timer = StageTimer(CPU)
    large = torch.randn(400, 400)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        with timer("products"):
            large @ large
        with timer("sums"):
            float(large.exp().sum())
    trace = read_trace(profiler.events(), is_cuda=False)
    products, sums = trace.stages["products"], trace.stages["sums"]
    assert products.seconds[MATRIX] > 0.5 * products.wall_seconds
    assert products.seconds[MEMORY] == products.host_syncs == 0
    assert sums.seconds[MATRIX] == 0 < sums.seconds[MEMORY]
    # exp and sum
    assert (products.launches, sums.launches, sums.host_syncs) == (1, 2, 1)
    for stage in (products, sums):
        assert sum(stage.shares().values()) == pytest.approx(1)
        assert all(0 <= share <= 1 for share in stage.shares().values())


def event(name: str, start: float, end: float, id: int = 0, device: str = "CPU", is_span: bool = False) -> Any:
    """As PyTorch's profiler has it: a kernel has the number of the call that launched it; operators count apart."""
    return SimpleNamespace(
        name=name,
        time_range=SimpleNamespace(start=start, end=end),
        id=id,
        device_type=f"DeviceType.{device}",
        thread=1,
        is_user_annotation=is_span,
    )


def test_kernels_of_a_gpu_belong_to_the_stage_that_launched_them() -> None:
    events = [
        event("stage/rollout", 0, 1e6, 1, is_span=True),
        event("stage/update", 1e6, 3e6, 2, is_span=True),
        # an operator with the number of another stage's launch
        event("aten::mm", 5, 25, 12),
        event("cudaLaunchKernel", 10, 20, 10),
        event("cuLaunchKernelEx", 30, 40, 11),
        event("cudaGraphLaunch", 1.1e6, 1.2e6, 12),
        # one wait, however it is called
        event("aten::_local_scalar_dense", 1.29e6, 1.41e6, 3),
        event("cudaStreamSynchronize", 1.3e6, 1.4e6, 13),
        event("cudaLaunchKernel", 5e6, 5.1e6, 14),
        # the GPU is behind: it runs the rollout's kernels when the host is in update
        event("nvjet_tst", 1.0e6, 1.6e6, 10, "CUDA"),
        event("triton_poi_fused_add", 1.6e6, 1.9e6, 11, "CUDA"),
        # both of one replay, which no operator launched
        event("nvjet_tst", 1.9e6, 2.9e6, 12, "CUDA"),
        event("triton_red_fused", 2.9e6, 3.4e6, 12, "CUDA"),
        event("triton_poi_fused_add", 5.1e6, 5.2e6, 14, "CUDA"),
        # spans as the GPU sees them are no kernels
        event("stage/rollout", 1.0e6, 1.9e6, 1, "CUDA", is_span=True),
        event("## Call CompiledFxGraph", 1.6e6, 1.9e6, 2, "CUDA", is_span=True),
        # launched before the trace began
        event("Memset (Device)", 0.5e6, 0.6e6, 9, "CUDA"),
    ]
    trace = read_trace(events, is_cuda=True)
    rollout, update, between = (trace.stages[name] for name in ("rollout", "update", NO_STAGE))
    assert rollout.shares() == pytest.approx({MATRIX: 0.6, MEMORY: 0.4, OTHER: 0.0})
    assert update.shares() == pytest.approx({MATRIX: 0.5, MEMORY: 0.25, OTHER: 0.25})
    assert (rollout.launches, rollout.host_syncs, update.launches, update.host_syncs) == (2, 0, 1, 1)
    assert between.launches == 1
    assert trace.kernel_seconds["nvjet_tst"] == pytest.approx(1.6)
    assert trace.kernel_calls == {
        "nvjet_tst": 2, "triton_poi_fused_add": 2, "triton_red_fused": 1, "Memset (Device)": 1
    }  # fmt: skip
    with pytest.raises(ValueError, match="no stage"):
        read_trace(events[2:9], is_cuda=True)


def test_pytorch_tells_of_an_event_what_a_trace_of_a_gpu_reads() -> None:
    with profile(activities=[ProfilerActivity.CPU]) as profiler, StageTimer(CPU)("rollout"):
        torch.ones(3) + 1
    events = {one.name: one for one in profiler.events()}
    assert events["stage/rollout"].is_user_annotation
    assert not events["aten::add"].is_user_annotation
    assert isinstance(events["aten::add"].id, int)


def test_the_page_by_hand() -> None:
    shares = {MATRIX: 1.0, MEMORY: 0.5, OTHER: 0.0}
    rollout = StageTrace(wall_seconds=2.0, seconds=dict(shares), launches=7, host_syncs=1)
    update = StageTrace(wall_seconds=2.0, seconds=dict(shares), launches=3)
    kernels = defaultdict(float, {"aten::mul": 1.0, "aten::mm": 2.0})
    trace = Trace({"rollout": rollout, "update": update}, kernels, Counter({"aten::mul": 5, "aten::mm": 4}))
    seconds, flops = {"rollout": 1.0, "update": 2.0, "iteration": 4.0}, {"rollout": 4 * 10**12, "update": 10**12}
    told = page(trace, seconds, flops, ceiling=8e12)
    assert "| rollout | 1.000 | 25.0% | 50.0% | 25.0% | 25.0% | 7 | 1 | 4 | 50.0% |" in told
    assert "| update | 2.000 | 50.0% | 50.0% | 25.0% | 25.0% | 3 | 0 | 1 | 6.2% |" in told
    assert f"| {NO_STAGE} | 1.000 | 25.0% | 0.0% | 0.0% | 100.0% | 0 | 0 | 0 | 0.0% |" in told
    # (.5 + 1) / 4, (.25 + .5) / 4 and what remains; 5 TFLOP in 4 seconds of 8 TFLOP/s
    assert "| iteration | 4.000 | 100.0% | 37.5% | 18.8% | 43.8% | 10 | 1 | 5 | 15.6% |" in told
    assert told.endswith("| aten::mm | matrix | 2.000 | 4 |\n| aten::mul | memory | 1.000 | 5 |\n")


def test_four_iterations_are_counted_timed_and_traced_and_their_metrics_passed_on(tmp_path: Path) -> None:
    x, weight = torch.randn(200, 300), torch.randn(300, 100)

    def step() -> dict[str, float]:
        timer = StageTimer(CPU)
        with timer("rollout"):
            (x @ weight).relu()
        return {"loss": 3.0, **{f"seconds/{name}": value for name, value in timer.seconds().items()}}

    profiled = Profile(directory=tmp_path / "profile", device=CPU, dtype=torch.float32, num_iterations=4)
    assert [profiled(step)["loss"] for _ in range(5)] == [3.0] * 5
    lines = {
        line.split(" | ")[0].strip("| "): line for line in (tmp_path / "profile/table.md").read_text().splitlines()
    }
    assert f"| {2 * 200 * 300 * 100 / 1e12:.4g} |" in lines["rollout"]
    assert "matrix" in lines["aten::mm"]
    assert "memory" in lines["aten::clamp_min"]
    events = json.loads(gzip.decompress((tmp_path / "profile/trace.json.gz").read_bytes()))["traceEvents"]
    assert sum(one["name"] == "stage/rollout" for one in events) == 1
    assert unprofiled(step)["loss"] == 3.0


def test_a_run_too_short_to_profile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"needs 4 iterations and train\.iterations is 3; raise it"):
        Profile(directory=tmp_path, device=CPU, dtype=torch.float32, num_iterations=3)


def test_a_run_writes_its_profile_and_trains_as_without(tiny_weights: Path, tmp_path: Path) -> None:
    # a trace of few operations
    small = ["train.group_size=2", "train.prompts_per_iteration=1", "algorithm.schedule.num_steps=2"]
    small += ["train.iterations=4", "evaluate.every=4", "evaluate.num_steps=1", "reward.golden=false"]
    runs = {}
    for profiled in ("false", "true"):
        config = make_config(tiny_weights, tmp_path / profiled / "run", f"runtime.profile={profiled}", *small)
        runs[profiled] = train(config)
    losses = [
        [json.loads(line)["grad_norm"] for line in (path / "metrics.jsonl").read_text().splitlines() if "loss" in line]
        for path in runs.values()
    ]
    assert losses[0] == losses[1]
    assert not (runs["false"] / "profile").exists()
    table = (runs["true"] / "profile/table.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    stages = {row[0]: row for row in rows if len(row) == 10 and row[0] not in ("stage", "---")}
    assert {"encode", "search", "rollout", "reward", "update", NO_STAGE, "iteration"} == stages.keys()
    for row in stages.values():
        assert sum(float(share.rstrip("%")) for share in row[3:6]) == pytest.approx(100, abs=0.2)
    parts = sum(float(row[1]) for name, row in stages.items() if name != "iteration")
    assert parts == pytest.approx(float(stages["iteration"][1]), abs=0.004)
    assert float(stages["rollout"][8]) > float(stages["encode"][8]) == 0
