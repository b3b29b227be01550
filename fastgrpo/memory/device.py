"""The device of a run, and its memory: how much there is, how much is in use, and the most that was."""

import os
import resource
import sys
from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist

from fastgrpo.compile.cuda_graphs import eagerly
from fastgrpo.memory.byte_count import LiveBytes
from fastgrpo.settings import Runtime


def device_of(runtime: Runtime) -> str:
    """``runtime.device``, where auto is CUDA if there is one; ValueError for a CUDA device that is not there."""
    device = runtime.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"runtime.device is {device} but PyTorch sees no CUDA device; use runtime.device=cpu")
    number = device.partition(":")[2]
    if number and int(number) >= torch.cuda.device_count():
        raise ValueError(
            f"runtime.device is {device} but PyTorch sees {torch.cuda.device_count()} CUDA devices, from 0"
        )
    # each rank of a machine has its own; by number, since threads begin with the first one
    return f"cuda:{torch.cuda.current_device()}" if device == "cuda" and dist.is_initialized() else device


def set_threads(runtime: Runtime) -> None:
    """As many CPU threads as ``runtime.threads`` says."""
    if runtime.threads > 0:
        torch.set_num_threads(runtime.threads)


def peak_bytes(device: torch.device) -> int:
    """The most that was allocated on a CUDA device, or the largest resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, Linux kibibytes
    return peak if sys.platform == "darwin" else 1024 * peak


def usable_bytes(device: torch.device) -> int:
    """What this process may allocate in all: on a CUDA device less what others use, else the machine's memory."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Meter(Protocol):
    """``peak(run)``: the most bytes in use while ``run`` runs, those that were in use before included."""

    def peak(self, run: Callable[[], object]) -> int: ...


class AllocatorMeter:
    """What is asked of PyTorch's allocator on a CUDA device.  Compiled functions run eagerly: each size compiles anew.

    It gives out up to 1 MiB more a tensor: a tenth of the hundreds of tensors of one sample, and next to nothing of as
    many larger ones, so that what it gives out for few samples says little about many.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def peak(self, run: Callable[[], object]) -> int:
        torch.cuda.reset_peak_memory_stats(self._device)
        with eagerly():
            run()
        return int(torch.cuda.memory_stats(self._device)["requested_bytes.all.peak"])


class CountingMeter:
    """Live tensors on a CPU, or FakeTensors; ``resident`` bytes were there before this meter."""

    def __init__(self, resident: int = 0) -> None:
        self._resident = resident
        self._counter = LiveBytes()

    def peak(self, run: Callable[[], object]) -> int:
        self._counter.peak = self._counter.live
        with self._counter, eagerly():
            run()
        return self._resident + self._counter.peak


def meter_of(device: torch.device) -> Meter:
    """The meter of a device that has its model."""
    return AllocatorMeter(device) if device.type == "cuda" else CountingMeter(resident=peak_bytes(device))
