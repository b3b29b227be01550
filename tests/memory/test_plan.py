"""The memory plan: batches by hand-computed bytes, and what was planned is what a run then uses."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgrpo.memory.batch_size import DoesNotFit
from fastgrpo.memory.plan import (
    DECODING,
    REWARD,
    SAMPLING,
    TRAINING,
    Cost,
    MemoryPlan,
    even_batch,
    measure,
    plan_memory,
)

TOTALS = {TRAINING: 96, SAMPLING: 192, REWARD: 64}


def make_plan(memory: int, training: Cost, sampling: Cost, decoding: Cost, *, held: int = 0) -> MemoryPlan:
    costs = {TRAINING: training, SAMPLING: sampling, DECODING: decoding}
    return plan_memory(costs, TOTALS, held=held, memory=memory, checkpointing=False)


def test_a_cost_is_the_line_through_two_peaks() -> None:
    cost = Cost.of(130, 160)
    assert cost == Cost(fixed=100, per_sample=30)
    assert cost.bytes(4) == 220
    # the same line, from two samples and three
    assert Cost.of(160, 190, 2) == cost
    assert [cost.fitting(budget) for budget in (129, 130, 159, 160, 400)] == [0, 1, 1, 2, 10]


def test_what_a_stage_leaves_behind_is_in_every_cost() -> None:
    left: set[str] = set()

    class Meter:
        def peak(self, run: Callable[[], object]) -> int:
            num_bytes = run()
            assert isinstance(num_bytes, int)
            return 100 * len(left) + num_bytes

    def stage(name: str, per_sample: int) -> Callable[[int], int]:
        def run(num_samples: int) -> int:
            left.add(name)
            return per_sample * num_samples

        return run

    stages = {TRAINING: stage(TRAINING, 7), DECODING: stage(DECODING, 3)}
    assert measure(stages, Meter()) == {TRAINING: Cost(200, 7), DECODING: Cost(200, 3)}


@pytest.mark.parametrize(
    ("fits", "cost"), [(3, Cost(60, 10)), (2, Cost(75, 5)), (1, Cost(0, 80))], ids=["three", "two", "one"]
)
def test_a_stage_is_measured_with_as_many_samples_as_fit(fits: int, cost: Cost) -> None:
    # one sample is no example of many
    peaks = {1: 80, 2: 85 if fits == 2 else 80, 3: 90}

    class Meter:
        def peak(self, run: Callable[[], object]) -> int:
            num_samples = run()
            assert isinstance(num_samples, int)
            if num_samples > fits:
                raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
            return peaks[num_samples]

    assert measure({TRAINING: lambda n: n}, Meter()) == {TRAINING: cost}


def test_what_fails_for_another_reason_is_not_measured_smaller() -> None:
    class Meter:
        def peak(self, run: Callable[[], object]) -> int:
            if run() == 3:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return 1

    with pytest.raises(RuntimeError, match="illegal memory access"):
        measure({TRAINING: lambda n: n}, Meter())


@pytest.mark.parametrize(
    ("total", "fitting", "enough", "batch"),
    [
        (64, 64, 16, 16),
        (64, 64, None, 64),
        # 14 would compute a row more than the 97 at once
        (97, 97, 16, 97),
        # as many rows as 4 batches of 12
        (48, 20, 9, 8),
        (8, 300, 16, 8),
        (64, 5, 16, 4),
    ],
)
def test_batches_are_no_larger_than_enough_where_that_computes_no_more_rows(
    total: int, fitting: int, enough: int | None, batch: int
) -> None:
    assert even_batch(total, fitting, enough) == batch


def test_rollouts_are_cut_into_batches_that_are_enough_and_decoded_in_those_that_kernels_can_count() -> None:
    costs = {SAMPLING: Cost(0, 1), DECODING: Cost(0, 1), TRAINING: Cost(0, 1)}
    plan = plan_memory(costs, TOTALS, held=0, memory=10_000, checkpointing=False, enough=32, most_decoded=31)
    # 192 samples in batches of 32, and these in two of 16: 31 at a time would compute 62 rows for 32
    assert {name: plan.batch(name) for name in costs} == {SAMPLING: 32, DECODING: 16, TRAINING: 96}
    assert plan.peak_bytes == 96


def test_what_graphs_keep_of_sampling_is_not_there_for_training_and_decoding() -> None:
    costs = {SAMPLING: Cost(300, 10), DECODING: Cost(300, 10), TRAINING: Cost(300, 10)}
    free, kept = (
        plan_memory(costs, TOTALS, held=100, memory=1000, checkpointing=False, enough=16, keeps_sampling=keeps_sampling)
        for keeps_sampling in (False, True)
    )
    assert free.batch(SAMPLING) == kept.batch(SAMPLING) == 16
    # 900 - 100 - 300, and less 16 * 10
    assert (free.choices[TRAINING].fitting, kept.choices[TRAINING].fitting) == (50, 34)
    assert (free.choices[DECODING].fitting, kept.choices[DECODING].fitting) == (50, 34)
    assert kept.choices[TRAINING].beside == 100 + 160


@pytest.mark.parametrize(
    ("total", "fitting", "batch"),
    [
        (96, 300, 96),
        (96, 40, 32),
        (96, 20, 16),
        (96, 1, 1),
        # 5 batches of 20 compute 100 rows, 7 of 14 only 98
        (97, 20, 14),
        (7, 3, 2),
        (5, 0, 0),
    ],
)
def test_batches_are_even_and_as_large_as_fits(total: int, fitting: int, batch: int) -> None:
    assert even_batch(total, fitting) == batch


@given(st.integers(1, 300), st.integers(1, 400))
def test_no_size_above_half_of_what_fits_computes_fewer_rows(total: int, fitting: int) -> None:
    batch, limit = even_batch(total, fitting), min(total, fitting)
    assert limit / 2 < batch <= limit
    rows = -(-total // batch) * batch
    assert all(rows <= -(-total // n) * n for n in range(limit // 2 + 1, limit + 1))


def test_nine_tenths_of_the_memory_are_planned_less_what_is_held() -> None:
    # 0.9 * 1000 - 100 - 300 leaves 500 for 10 a sample
    plan = make_plan(1000, Cost(300, 10), Cost(300, 1), Cost(300, 50), held=100)
    assert {name: choice.fitting for name, choice in plan.choices.items()} == {
        TRAINING: 50,
        SAMPLING: 500,
        DECODING: 10,
    }
    # what is decoded is a batch of sampling
    assert (plan.batch(TRAINING), plan.batch(SAMPLING), plan.batch(DECODING)) == (48, 192, 8)
    assert plan.choices[TRAINING].peak_bytes == 100 + 300 + 480
    assert all(choice.peak_bytes <= 900 for choice in plan.choices.values())
    assert not plan.lacks_room


def test_rewards_run_beside_the_rollout_and_take_from_it_but_not_from_the_update() -> None:
    costs = dict.fromkeys((TRAINING, SAMPLING, DECODING), Cost(300, 10))
    alone, beside = (
        plan_memory(c, TOTALS, held=0, memory=1000, checkpointing=False)
        for c in (costs, costs | {REWARD: Cost(300, 5)})
    )
    # of the 600 that are free a quarter fits 30 of them, and 4 batches of 16 are all 64
    assert (beside.choices[REWARD].fitting, beside.batch(REWARD)) == (30, 16)
    assert alone.choices[SAMPLING].fitting == 60
    assert beside.choices[SAMPLING].fitting == beside.choices[DECODING].fitting == (600 - 16 * 5) // 10
    assert beside.choices[TRAINING].fitting == alone.choices[TRAINING].fitting


def test_room_is_lacking_below_two_samples_unless_one_is_all_there_is() -> None:
    costs = {TRAINING: Cost(0, 300), SAMPLING: Cost(0, 1), DECODING: Cost(0, 1)}
    assert not make_plan(700, *costs.values()).lacks_room
    assert make_plan(600, *costs.values()).lacks_room
    one = plan_memory(costs, TOTALS | {TRAINING: 1}, held=0, memory=600, checkpointing=False)
    assert not one.lacks_room


def test_a_stage_that_does_not_fit_is_named_with_its_bytes_and_the_remedy() -> None:
    plan = make_plan(2**30, training=Cost(0, 1), sampling=Cost(0, 1), decoding=Cost(2**30, 2**29))
    with pytest.raises(
        DoesNotFit, match=r"one sample of decoding needs 1\.50 GiB, but 90% .*921\.6|0\.90 GiB.*lower mod"
    ):
        plan.check()
