"""How long variants take on a GPU, measured side by side.

A sweep runs a variant once on each of several input sets, whose results are kept: together they are larger than the
L2 cache, so what is measured is memory.  Sweeps of all variants take turns, round after round.  Each variant is timed
as it is called, Python and launches included, and as the replay of a CUDA graph, which leaves the kernels alone.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.kernels.case import Case, Inputs, Run, Variant

# of one sweep: five times the L2 cache of an H100
WORKING_SET_BYTES = 256 * 2**20
_MAX_SETS = 64
_SECONDS_PER_MEASUREMENT = 2e-3
_WARM_UP_SWEEPS = 3

Clock = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Quartiles:
    """Seconds a call."""

    median: float
    lower: float
    upper: float


@dataclass(frozen=True)
class Timing:
    called: Quartiles
    # None where the variant waits for the GPU, or where ``not_replayed`` says why not
    replayed: Quartiles | None
    not_replayed: str
    # memory of one call beyond its inputs
    peak_bytes: int

    @property
    def kernels(self) -> Quartiles:
        """Without launches, where that is known."""
        return self.replayed or self.called


def cuda_clock(work: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def host_clock(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def input_sets(case: Case, device: torch.device, *, working_set: int = WORKING_SET_BYTES) -> list[Inputs]:
    """As many inputs as it takes for a sweep to leave no cache warm."""
    num_sets = min(max(math.ceil(working_set / case.num_bytes), 2), _MAX_SETS)
    return [case.make(device, seed) for seed in range(num_sets)]


def with_copy(case: Case, sets: list[Inputs], device: torch.device) -> dict[str, Variant]:
    """The variants, and a device copy that moves as many bytes; its buffers join the input sets."""
    for inputs in sets:
        inputs["copied"] = torch.zeros(case.num_bytes // 2, dtype=torch.uint8, device=device)
    return {**case.variants, "copy": Variant(lambda inputs: (inputs["copied"].clone(),))}


def measure(variants: dict[str, Variant], sets: list[Inputs], clock: Clock, rounds: int) -> dict[str, Timing]:
    """Timings of all variants; by the host's clock of calls alone."""
    sweeps: dict[tuple[str, str], Callable[[], object]] = {}
    peaks, reasons = {}, dict.fromkeys(variants, "")
    for name, variant in variants.items():
        sweep = partial(_sweep, variant.run, sets)
        for _ in range(_WARM_UP_SWEEPS):
            sweep()
        peaks[name] = _peak_bytes(variant.run, sets[0])
        sweeps[name, "called"] = sweep
        if variant.waits or clock is host_clock:
            continue
        try:
            sweeps[name, "replayed"] = _graph(sweep)
        except RuntimeError as error:
            # told in the report
            reasons[name] = str(error).splitlines()[0]
    seconds = _interleaved(sweeps, clock, rounds, len(sets))
    return {
        name: Timing(seconds[name, "called"], seconds.get((name, "replayed")), reasons[name], peaks[name])
        for name in variants
    }


def _sweep(run: Run, sets: list[Inputs]) -> list[Any]:
    # kept until the last has been computed, so that no result overwrites another while it is in the cache
    return [run(inputs) for inputs in sets]


def _interleaved(
    sweeps: dict[tuple[str, str], Callable[[], object]], clock: Clock, rounds: int, num_sets: int
) -> dict[tuple[str, str], Quartiles]:
    repeats = {key: max(1, math.ceil(_SECONDS_PER_MEASUREMENT / clock(sweep))) for key, sweep in sweeps.items()}
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in sweeps}
    for _ in range(rounds):
        for key, sweep in sweeps.items():
            total = clock(partial(_repeat, sweep, repeats[key]))
            seconds[key].append(total / (repeats[key] * num_sets))
    return {key: quartiles(values) for key, values in seconds.items()}


def quartiles(values: list[float]) -> Quartiles:
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Quartiles(median, lower, upper)


def _repeat(sweep: Callable[[], object], times: int) -> None:
    for _ in range(times):
        sweep()


def _graph(sweep: Callable[[], object]) -> Callable[[], object]:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = sweep()

    def replay(kept: object = results) -> None:
        graph.replay()

    return replay


def _peak_bytes(run: Run, inputs: Inputs) -> int:
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(inputs)
    return torch.cuda.max_memory_allocated() - before
