"""Numbers, of the host's most often, on the device that computes with them."""

from collections.abc import Sequence

import torch
from torch import Tensor


def on_device(values: Tensor | Sequence[int] | Sequence[float], device: torch.device | str) -> Tensor:
    """``values`` there, whole numbers as int64, wherever they are.  The host does not wait for a GPU.

    The copy is queued from pinned memory: from any other CUDA may wait, for all that is queued before it.
    """
    tensor = values if isinstance(values, Tensor) else torch.tensor(values)
    if torch.device(device).type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
