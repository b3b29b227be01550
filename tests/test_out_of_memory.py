"""What counts as out of memory: PyTorch's own error and the statuses of libraries, but nothing that quotes them."""

import pytest
import torch

from fastgrpo.memory.batch_size import BatchSize, DoesNotFit
from fastgrpo.memory.batches import in_batches
from fastgrpo.out_of_memory import is_out_of_memory
from fastgrpo.rewards.scoring import Scoring

MEANT = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    torch.AcceleratorError("CUDA error: out of memory"),
]
OTHERS = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    ValueError("CUDA error: out of memory"),
    DoesNotFit("out of memory with runtime.micro_batch=1: CUDA error: out of memory"),
]


@pytest.mark.parametrize("error", MEANT, ids=str)
def test_a_batch_is_halved_for_every_way_of_saying_it(error: RuntimeError) -> None:
    assert is_out_of_memory(error)
    size, seen = BatchSize(value=4, key="runtime.micro_batch"), []

    def run(batch: object) -> None:
        seen.append(size.value)
        if size.value > 2:
            raise error

    assert len(list(in_batches(4, size, run))) == 2
    assert seen == [4, 2, 2]


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_what_no_smaller_batch_mends_is_raised(error: Exception) -> None:
    assert not is_out_of_memory(error)
    size = BatchSize(value=4, key="runtime.micro_batch")

    def run(batch: object) -> None:
        raise error

    with pytest.raises(type(error)):
        list(in_batches(4, size, run))
    assert size.value == 4


@pytest.mark.parametrize("error", MEANT, ids=str)
def test_a_reward_gets_half_as_many_images_too(error: RuntimeError) -> None:
    def reward(images_BCHW: torch.Tensor, texts: list[str]) -> torch.Tensor:
        if len(texts) > 2:
            raise error
        return images_BCHW.mean(dim=(1, 2, 3))

    images_BCHW = torch.arange(4.0)[:, None, None, None].expand(4, 3, 2, 2)
    assert Scoring(micro_batch=4)("large", reward, images_BCHW, ["a"] * 4).tolist() == [0, 1, 2, 3]
