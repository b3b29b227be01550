"""Micro-batches cover each row once, all have one size, and what does not fit in memory is halved."""

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastgrpo.batches import Batch, batches, in_batches
from fastgrpo.runtime.batch_size import BatchSize
from fastgrpo.types import Conditions


@given(total=st.integers(1, 40), size=st.integers(1, 50))
def test_batches_cover_each_row_once_and_have_one_size(total: int, size: int) -> None:
    rows = torch.arange(total)
    cut = list(batches(total, size))
    assert torch.equal(torch.cat([batch.of(rows)[: batch.count] for batch in cut]), rows)
    assert {len(batch.of(rows)) for batch in cut} == {min(size, total)}


def test_a_batch_is_filled_up_with_the_first_rows() -> None:
    batch = Batch(first=4, count=2, size=4)
    assert batch.of(torch.arange(6)).tolist() == [4, 5, 0, 1]
    assert batch.of(torch.arange(12).view(2, 6), dim=1).tolist() == [[4, 5, 0, 1], [10, 11, 6, 7]]
    conditions = Conditions(torch.arange(6.0)[:, None, None], torch.arange(6.0)[:, None], keys=(9, 8, 7, 6, 5, 4))
    filled = batch.conditions(conditions)
    assert filled.embeds_BLC.flatten().tolist() == filled.pooled_BC.flatten().tolist() == [4, 5, 0, 1]
    assert filled.keys == (5, 4, 9, 8)


def test_what_does_not_fit_runs_in_halves_and_no_row_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    size = BatchSize(value=8, key="runtime.micro_batch")
    tried: list[int] = []

    def run(batch: Batch) -> torch.Tensor:
        tried.append(batch.size)
        # the first batch fits, the second does not until it has 2 rows
        if batch.first and batch.size > 2:
            raise torch.OutOfMemoryError("too many")
        return batch.of(torch.arange(13))[: batch.count]

    with caplog.at_level(logging.WARNING):
        rows = torch.cat([part for _, part in in_batches(13, size, run)])
    assert rows.tolist() == list(range(13))
    assert tried == [8, 8, 4, 2, 2, 2]
    assert size.value == 2
    assert [record.getMessage() for record in caplog.records] == [
        "out of memory with runtime.micro_batch=8; from now it is 4",
        "out of memory with runtime.micro_batch=4; from now it is 2",
    ]
