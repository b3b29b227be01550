"""A batch that did not fit is halved, said, and never goes below one sample."""

import logging
import weakref

import pytest
import torch

from fastgrpo.memory.batch_size import BatchSize, DoesNotFit


def test_each_halving_is_one_line_that_names_the_key_and_both_values(caplog: pytest.LogCaptureFixture) -> None:
    size = BatchSize(value=9, key="runtime.micro_batch")
    values = []
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            size.halve(torch.OutOfMemoryError("8 GiB wanted"))
            values.append(size.value)
    assert values == [4, 2, 1]
    assert caplog.messages == [
        "out of memory with runtime.micro_batch=9; from now it is 4",
        "out of memory with runtime.micro_batch=4; from now it is 2",
        "out of memory with runtime.micro_batch=2; from now it is 1",
    ]


def test_one_sample_that_does_not_fit_ends_the_run_with_the_remedy() -> None:
    size = BatchSize(value=1, key="runtime.decode_batch")
    with pytest.raises(DoesNotFit, match=r"runtime\.decode_batch=1: 8 GiB wanted; set runtime\.checkpointing=true"):
        size.halve(torch.OutOfMemoryError("8 GiB wanted"))
    assert size.value == 1


def test_a_size_below_one_is_refused_with_the_key() -> None:
    with pytest.raises(ValueError, match=r"runtime\.sampling_batch must be at least 1, got 0"):
        BatchSize(value=0, key="runtime.sampling_batch")


def test_the_tensors_of_the_failed_batch_are_freed_before_the_next_attempt() -> None:
    seen: list[weakref.ref[torch.Tensor]] = []

    def attempt() -> None:
        activations = torch.zeros(1000)
        seen.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("8 GiB wanted")

    size = BatchSize(value=2, key="runtime.micro_batch")
    try:
        attempt()
    except torch.OutOfMemoryError as error:
        assert seen[0]() is not None
        size.halve(error)
        assert seen[0]() is None
