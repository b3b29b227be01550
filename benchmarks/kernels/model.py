"""What an H100 could do at best with a kernel's machine code: a model, and no measurement.

A kernel needs the larger of two times: for its bytes, at the speed of a device copy (3.0 TB/s, measured on an H100 80GB
HBM3), and for its instructions, at the rates at which an SM takes them: 4 warps a clock, of which 2 with float64
arithmetic (64 lanes) and one every other clock with the special function unit, which also converts (16 lanes; CUDA C++
programming guide, arithmetic instructions of compute capability 9.0).  Latencies and dependencies are left out, so
real times are longer.
"""

from typing import NamedTuple

from benchmarks.kernels.sass import Sass

_COPY_BYTES_PER_SECOND = 3.0e12
_CLOCKS_PER_SECOND = 132 * 1.755e9
_WARPS_PER_CLOCK = {"all": 4.0, "float64": 2.0, "special": 0.5}


class Seconds(NamedTuple):
    """Of one launch."""

    memory: float
    instructions: float

    @property
    def bound(self) -> str:
        return "memory" if self.memory >= self.instructions else "instructions"


def modelled_seconds(sass: Sass, num_programs: int) -> Seconds:
    num_bytes = (sass.loads.num_bytes + sass.stores.num_bytes) * sass.num_threads * num_programs
    num_warps = sass.num_threads / 32 * num_programs
    counts = {"all": sass.num_run(), "float64": sass.num_float64, "special": sass.num_special}
    clocks = max(counts[kind] / rate for kind, rate in _WARPS_PER_CLOCK.items())
    return Seconds(num_bytes / _COPY_BYTES_PER_SECOND, clocks * num_warps / _CLOCKS_PER_SECOND)
