"""Where an iteration's time goes: ``fastgrpo train runtime.profile=true`` writes a table and a trace beside the run.

iteration 1 is not looked at: it compiles
iteration 2 counts FLOPs, eagerly, since what is compiled or a CUDA graph cannot be counted
iteration 3 is timed as it is
iteration 4 is traced, which costs time: only shares, launches and host syncs are taken from it

utilisation = FLOPs / seconds / ceiling,   ceiling: FLOPs per second of a large matrix product of the run's dtype
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from fastgrpo.compile.cuda_graphs import eagerly
from fastgrpo.profiling.flops import StageFlops, matmul_ceiling
from fastgrpo.profiling.timing import NO_STAGE
from fastgrpo.profiling.trace import MATRIX, MEMORY, OTHER, StageTrace, Trace, kernel_class, read_trace

NUM_ITERATIONS = 4
Step = Callable[[], dict[str, float]]
_NUM_KERNELS = 15
_HEADER = (
    "stage", "seconds", "of iteration", "matrix products", "memory-bound", "rest", "launches", "host syncs", "TFLOP",
    "utilisation",
)  # fmt: skip
_LEGEND = """\
Seconds are of an iteration without instruments.  Matrix products are with attention and convolutions; memory-bound are
elementwise kernels, reductions and copies; the rest is the host, and a GPU that waits for it.  On a CPU launches are
operators, and host syncs are what would be one on a GPU.  FLOPs are of matrix products, attention and convolutions as
executed on the thread of the stages.  Utilisation is their rate as a share of the measured ceiling."""


def check_iterations(num_iterations: int) -> None:
    """ValueError for a run that is too short to be looked at."""
    if num_iterations < NUM_ITERATIONS:
        raise ValueError(
            f"runtime.profile needs {NUM_ITERATIONS} iterations and train.iterations is {num_iterations}; raise it"
        )


@dataclass(kw_only=True)
class Profile:
    """Called around each ``Trainer.step``; with the fourth it writes table.md and trace.json.gz into ``directory``."""

    directory: Path
    device: torch.device
    dtype: torch.dtype
    num_iterations: int
    _calls: int = field(default=0, init=False)
    _flops: dict[str, int] = field(default_factory=dict, init=False)
    _seconds: dict[str, float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        check_iterations(self.num_iterations)

    def __call__(self, step: Step) -> dict[str, float]:
        self._calls += 1
        if self._calls == 2:
            return self._count(step)
        if self._calls == 4:
            return self._trace(step)
        metrics = step()
        if self._calls == 3:
            self._seconds = {
                name.removeprefix("seconds/"): value for name, value in metrics.items() if name.startswith("seconds/")
            }
        return metrics

    def _count(self, step: Step) -> dict[str, float]:
        with eagerly(), StageFlops() as flops:
            metrics = step()
        self._flops = dict(flops.by_stage)
        return metrics

    def _trace(self, step: Step) -> dict[str, float]:
        is_cuda = self.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
        with profile(activities=activities) as profiler:
            metrics = step()
        self.directory.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.directory / "trace.json.gz"))
        trace = read_trace(profiler.events(), is_cuda=is_cuda)
        ceiling = matmul_ceiling(self.device, self.dtype)
        (self.directory / "table.md").write_text(page(trace, self._seconds, self._flops, ceiling), encoding="utf-8")
        return metrics


def unprofiled(step: Step) -> dict[str, float]:
    """In place of a ``Profile``."""
    return step()


def page(trace: Trace, seconds: Mapping[str, float], flops: Mapping[str, int], ceiling: float) -> str:
    """One page of Markdown; ``seconds`` are of each stage and of the whole ``iteration``, ``ceiling`` in FLOPs/s."""
    whole = seconds["iteration"]
    stages = {name: seconds[name] for name in trace.stages if name in seconds}
    stages[NO_STAGE] = max(0.0, whole - sum(stages.values()))
    rows, shares = [], dict.fromkeys((MATRIX, MEMORY, OTHER), 0.0)
    for name, taken in stages.items():
        stage = trace.stages.get(name, StageTrace())
        for kind, share in stage.shares().items():
            shares[kind] += share * taken / whole
        counts = (stage.launches, stage.host_syncs)
        rows.append(_row(name, taken, whole, stage.shares(), counts, flops.get(name, 0), ceiling))
    launches, syncs = (
        sum(getattr(stage, name) for stage in trace.stages.values()) for name in ("launches", "host_syncs")
    )
    rows.append(_row("iteration", whole, whole, shares, (launches, syncs), sum(flops.values()), ceiling))
    kernels = [
        [name, kernel_class(name), f"{trace.kernel_seconds[name]:.3f}", str(trace.kernel_calls[name])]
        for name in sorted(trace.kernel_seconds, key=lambda name: -trace.kernel_seconds[name])[:_NUM_KERNELS]
    ]
    return "\n\n".join(
        [
            "# Where an iteration's time goes",
            f"Measured ceiling: {ceiling / 1e12:.3g} TFLOP/s.",
            _table(list(_HEADER), rows),
            _LEGEND,
            "## Kernels of the traced iteration that take most",
            _table(["kernel", "class", "seconds", "calls"], kernels) + "\n",
        ]
    )


def _row(
    name: str,
    seconds: float,
    whole: float,
    shares: Mapping[str, float],
    counts: tuple[int, int],
    flops: int,
    ceiling: float,
) -> list[str]:
    return [
        name,
        f"{seconds:.3f}",
        f"{seconds / whole:.1%}",
        *(f"{shares[kind]:.1%}" for kind in (MATRIX, MEMORY, OTHER)),
        *map(str, counts),
        f"{flops / 1e12:.4g}",
        f"{flops / seconds / ceiling:.1%}" if seconds else "-",
    ]


def _table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *rows])
