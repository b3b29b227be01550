"""Micro-batches cover each row once, all have one size, and what does not fit in memory is halved."""

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastgrpo.memory.batch_size import BatchSize, DoesNotFit
from fastgrpo.memory.batches import Batch, batches, even, in_batches
from fastgrpo.types import Conditions


@given(total=st.integers(1, 40), size=st.integers(1, 50))
def test_batches_cover_each_row_once_and_have_one_size(total: int, size: int) -> None:
    rows = torch.arange(total)
    cut = list(batches(total, size))
    assert torch.equal(torch.cat([batch.of(rows)[: batch.count] for batch in cut]), rows)
    assert {len(batch.of(rows)) for batch in cut} == {min(size, total)}


@given(total=st.integers(1, 40), size=st.integers(1, 50))
def test_even_batches_are_no_more_and_fill_up_less_than_one_row_each(total: int, size: int) -> None:
    num_batches = len(list(batches(total, size)))
    assert len(list(batches(total, even(total, size)))) == num_batches
    assert num_batches * even(total, size) - total < num_batches


@given(total=st.integers(1, 40), size=st.integers(1, 50), data=st.data())
def test_ranks_in_step_run_as_many_batches_of_one_shape(total: int, size: int, data: st.DataObject) -> None:
    most = data.draw(st.integers(total, total + 1))
    cut = list(batches(total, size, most, in_step=True))
    others = list(batches(most, size))
    assert [batch.size for batch in cut] == [batch.size for batch in others]
    rows = torch.arange(total)
    assert all(len(batch.of(rows)) == batch.size for batch in cut)
    assert torch.equal(torch.cat([batch.of(rows)[: batch.count] for batch in cut]), rows)
    # out of step it stops where its rows end
    alone = list(batches(total, size, most))
    assert alone == cut[: len(alone)]
    assert all(batch.count == 0 for batch in cut[len(alone) :])


def test_what_does_not_fit_is_not_halved_where_ranks_keep_step() -> None:
    def run(batch: Batch) -> None:
        raise torch.OutOfMemoryError("too many")

    size = BatchSize(value=8, key="runtime.micro_batch")
    with pytest.raises(DoesNotFit, match=r"runtime\.micro_batch=8: too many; lower runtime\.micro_batch"):
        list(in_batches(13, size, run, in_step=True))
    assert size.value == 8


def test_a_batch_is_filled_up_with_the_first_rows() -> None:
    batch = Batch(first=4, count=2, size=4)
    assert batch.of(torch.arange(6)).tolist() == [4, 5, 0, 1]
    assert batch.of(torch.arange(12).view(2, 6), dim=1).tolist() == [[4, 5, 0, 1], [10, 11, 6, 7]]
    # one row of seven in batches of three is alone with two places to fill
    assert Batch(first=0, count=1, size=4).of(torch.tensor([7])).tolist() == [7, 7, 7, 7]
    assert Batch(first=0, count=2, size=7).of(torch.tensor([1, 2])).tolist() == [1, 2, 1, 2, 1, 2, 1]
    few = Conditions(torch.tensor([1.0, 2.0])[:, None, None], torch.tensor([1.0, 2.0])[:, None], keys=(4, 5))
    assert Batch(first=0, count=2, size=5).conditions(few).keys == (4, 5, 4, 5, 4)
    assert Batch(first=0, count=2, size=5).conditions(few).pooled_BC.flatten().tolist() == [1, 2, 1, 2, 1]
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
