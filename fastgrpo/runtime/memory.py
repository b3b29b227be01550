"""Peak memory: of the GPU where there is one, else of the process."""

import resource
import sys

import torch


def peak_bytes(device: torch.device) -> int:
    """The most that was allocated on a CUDA device, or the largest resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, Linux kibibytes
    return peak if sys.platform == "darwin" else 1024 * peak
