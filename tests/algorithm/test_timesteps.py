import pytest

from fastgrpo.algorithm.timesteps import AllButLast, RandomSubset, RandomWindow, SlidingWindow


def test_all_but_last():
    assert AllButLast()(4, iteration=7, seed=1) == (0, 1, 2)


def test_random_windows_are_neighbors_inside_and_reach_everywhere():
    windows = {RandomWindow(3, 0, 5)(10, iteration, seed=42) for iteration in range(100)}
    assert windows == {(0, 1, 2), (1, 2, 3), (2, 3, 4)}


@pytest.mark.parametrize("timesteps", [RandomWindow(2, 1, 8), RandomSubset(0.5)])
def test_random_choices_are_functions_of_iteration_and_seed(timesteps):
    def draws(seed):
        return [timesteps(10, iteration, seed) for iteration in range(50)]

    assert draws(seed=1) == draws(seed=1) != draws(seed=2)
    assert len(set(draws(seed=1))) > 5


def test_sliding_window_moves_and_begins_again():
    window = SlidingWindow(size=4, stride=1, every=25)
    assert window(7, 0, seed=0) == window(7, 24, seed=5) == (0, 1, 2, 3)
    assert window(7, 25, seed=0) == (1, 2, 3, 4)
    assert window(7, 50, seed=0) == (2, 3, 4, 5)
    assert window(7, 75, seed=0) == (0, 1, 2, 3)
    assert SlidingWindow(size=2, stride=3, every=1)(7, 1, seed=0) == (3, 4)
    assert SlidingWindow(size=2, stride=3, every=1)(7, 2, seed=0) == (0, 1)


def test_random_subset_is_sorted_and_never_has_the_last_step():
    seen = [RandomSubset(0.6)(16, iteration, seed=3) for iteration in range(60)]
    assert {len(steps) for steps in seen} == {9}
    assert all(list(steps) == sorted(set(steps)) for steps in seen)
    assert {step for steps in seen for step in steps} == set(range(15))
    assert RandomSubset(1.0)(5, 0, 0) == (0, 1, 2, 3)
