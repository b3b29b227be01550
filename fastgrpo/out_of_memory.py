"""What an error must be to mean that a device has no memory left, so that less at a time may help.

PyTorch's own allocator raises ``OutOfMemoryError``.  Libraries that allocate for themselves, and CUDA where it loads a
kernel, tell it by a status, which PyTorch raises as a plain error with that name in its text.
"""

import torch

_STATUSES = (
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    # cuDNN's name from version 9 on
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device had no memory left; an error that only quotes such a one is none."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    is_plain = type(error) in (RuntimeError, torch.AcceleratorError)
    return is_plain and any(status in str(error) for status in _STATUSES)


def release(error: BaseException) -> None:
    """Let go of the tensors of what failed, which the frames of ``error`` hold, and of blocks that nobody uses."""
    error.__traceback__ = None
    if torch.cuda.is_available():
        # blocks of larger tensors do not fit smaller ones, and would stay reserved
        torch.cuda.empty_cache()
