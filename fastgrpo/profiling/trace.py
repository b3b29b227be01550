"""What a trace of one iteration says of each stage: seconds by class of kernel, launches, host syncs.

On a GPU kernels are counted in the stage that launched them, each by its launch, also those that no operator of PyTorch
launched: a replayed graph's and compiled code's.  On a CPU an operator is its own kernel, and its time is without that
of the operators it calls.  Only the thread of the stages is counted: rewards in threads are not.
"""

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastgrpo.profiling.timing import NO_STAGE, STAGE

MATRIX, MEMORY, OTHER = "matrix", "memory", "other"
_MATRIX = (
    "gemm", "gemv", "cutlass", "nvjet", "xmma", "wgmma", "flash", "fmha", "attention", "conv", "triton_tem",
    "aten::mm", "aten::bmm", "aten::addmm", "aten::addbmm", "aten::baddbmm", "aten::_scaled_mm", "aten::linear",
    "aten::matmul", "aten::dot", "mkldnn", "cudnn",
)  # fmt: skip
# views and allocations move nothing
_OTHER = (
    "aten::view", "aten::_unsafe_view", "aten::reshape", "aten::_reshape_alias", "aten::as_strided", "aten::t",
    "aten::transpose", "aten::permute", "aten::expand", "aten::expand_as", "aten::unsqueeze", "aten::squeeze",
    "aten::select", "aten::slice", "aten::narrow", "aten::split", "aten::chunk", "aten::unbind", "aten::flatten",
    "aten::unflatten", "aten::detach", "aten::detach_", "detach", "detach_", "aten::alias", "aten::empty",
    "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::resize_", "aten::item",
    "aten::_local_scalar_dense", "aten::is_nonzero", "aten::result_type", "aten::lift_fresh", "aten::set_",
    "aten::view_as", "aten::conj", "aten::unfold", "aten::movedim", "aten::numpy_t", "aten::contiguous",
    "aten::resolve_conj", "aten::resolve_neg",
)  # fmt: skip
_CPU_KERNELS = ("aten::", "fastgrpo::", "fastgrpo_kernels::", "cpp_fused", "graph_", "mkldnn")
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
_SYNCS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
# what would wait on a GPU; there it calls one of the above
_SYNCS_ON_CPU = ("aten::_local_scalar_dense",)


def kernel_class(name: str) -> str:
    """MATRIX: products, convolutions, attention.  MEMORY: elementwise, reductions, copies.  OTHER: the rest."""
    if name in _OTHER:
        return OTHER
    lower = name.lower()
    if any(part in lower for part in _MATRIX):
        return MATRIX
    return MEMORY


@dataclass
class StageTrace:
    """One stage of a traced iteration."""

    wall_seconds: float = 0.0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys((MATRIX, MEMORY, OTHER), 0.0))
    launches: int = 0
    host_syncs: int = 0

    def shares(self) -> dict[str, float]:
        """Of the stage's time; OTHER has what no kernel accounts for: the host, and a GPU that waits for it."""
        whole = max(self.wall_seconds, sum(self.seconds.values()))
        if whole == 0:
            return {MATRIX: 0.0, MEMORY: 0.0, OTHER: 1.0}
        matrix, memory = (self.seconds[kind] / whole for kind in (MATRIX, MEMORY))
        return {MATRIX: matrix, MEMORY: memory, OTHER: 1 - matrix - memory}


@dataclass
class Trace:
    """All stages, and seconds and calls of each kernel."""

    stages: dict[str, StageTrace]
    kernel_seconds: defaultdict[str, float]
    kernel_calls: Counter[str]


def read_trace(events: Iterable[Any], *, is_cuda: bool) -> Trace:
    """Of ``torch.profiler.profile.events()``; ValueError if no stage is in it."""
    events = list(events)
    spans = sorted(
        (e.time_range.start, e.time_range.end, e.name.removeprefix(STAGE), e.thread)
        for e in events
        if e.name.startswith(STAGE) and _is_on_cpu(e)
    )
    if not spans:
        raise ValueError("the trace has no stage; was it taken around Trainer.step?")
    trace = Trace({}, defaultdict(float), Counter())
    for start, end, name, _ in spans:
        trace.stages.setdefault(name, StageTrace()).wall_seconds += (end - start) / 1e6
    threads = {thread for *_, thread in spans}
    starts = [start for start, *_ in spans]

    def stage_at(time: float) -> StageTrace:
        place = bisect_right(starts, time) - 1
        inside = place >= 0 and time < spans[place][1]
        return trace.stages.setdefault(spans[place][2] if inside else NO_STAGE, StageTrace())

    calls = {event.id: event.time_range.start for event in events if _is_call_of_cuda(event)}
    for event in events:
        # spans of the GPU's own time, stages among them, hold kernels that are counted anyway
        if event.name.startswith(STAGE) or (not _is_on_cpu(event) and event.is_user_annotation):
            continue
        if not _is_on_cpu(event):
            span = event.time_range
            # what was launched before the trace began is counted when it ran
            stage = stage_at(calls.get(event.id, span.start))
            _add(trace, stage, [(event.name, (span.end - span.start) / 1e6)])
            continue
        stage = stage_at(event.time_range.start)
        stage.host_syncs += int(event.name in (_SYNCS if is_cuda else _SYNCS_ON_CPU))
        if is_cuda:
            stage.launches += int(event.name.startswith(_LAUNCHES))
        elif event.thread in threads and event.name.startswith(_CPU_KERNELS):
            stage.launches += int(_computes(event) and not any(map(_computes, event.cpu_children)))
            _add(trace, stage, [(event.name, event.self_cpu_time_total / 1e6)])
    return trace


def _is_on_cpu(event: Any) -> bool:
    return "CPU" in str(event.device_type)


def _is_call_of_cuda(event: Any) -> bool:
    """Of its runtime or driver, whose number its kernels and copies carry; operators are numbered apart."""
    return _is_on_cpu(event) and event.name.startswith(("cuda", "cu"))


def _computes(event: Any) -> bool:
    return event.name.startswith(_CPU_KERNELS) and kernel_class(event.name) != OTHER


def _add(trace: Trace, stage: StageTrace, kernels: Sequence[tuple[str, float]]) -> None:
    for name, seconds in kernels:
        stage.seconds[kernel_class(name)] += seconds
        trace.kernel_seconds[name] += seconds
        trace.kernel_calls[name] += 1
