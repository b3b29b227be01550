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
