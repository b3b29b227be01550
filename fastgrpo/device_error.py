"""Whether what was raised says that the GPU has failed under this process, and not that the program asked for too much.

After such an error (an illegal address, an ECC error, a bus that fell off) every further call of CUDA fails alike until
the process ends, and the call that it is raised by need not be the one to blame.
"""

import torch

from fastgrpo.out_of_memory import is_out_of_memory

_REFUSALS = (
    "STATUS_NOT_SUPPORTED",
    "STATUS_BAD_PARAM",
    "STATUS_INVALID_VALUE",
    "CUDA error: invalid argument",
    "CUDA error: invalid configuration argument",
)


def is_device_error(error: BaseException) -> bool:
    """Of a GPU, NCCL's included: to be neither retried nor put down to who happened to meet it."""
    # what could not be allocated is no failure of the GPU, nor is a call that it refused: the next one is answered
    if is_out_of_memory(error) or any(refusal in str(error) for refusal in _REFUSALS):
        return False
    if isinstance(error, torch.AcceleratorError | torch.distributed.DistBackendError):
        return True
    # libraries raise theirs as plain RuntimeErrors: CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling ...
    return isinstance(error, RuntimeError) and str(error).startswith(("CUDA error:", "cuDNN error:"))
