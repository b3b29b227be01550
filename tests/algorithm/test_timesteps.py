import pytest
import torch

from fastgrpo.algorithm.timesteps import AllButLast, DrawnTimes, RandomSubset, RandomWindow, SlidingWindow


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


def unshifted(t, shift):
    """The u of t = shift u / (1 + (shift - 1) u)."""
    return t.double() / (shift - (shift - 1) * t.double())


@pytest.mark.parametrize("per_image", [1, 3])
def test_drawn_times_are_stratified_over_each_group_and_over_all(per_image):
    t_UDB = DrawnTimes(per_image=per_image, shift=3.0)(4, 5, num_updates=2, iteration=3, seed=7)
    assert t_UDB.shape == (2, per_image, 20)
    for t_DB in t_UDB:
        u_PS = unshifted(t_DB, 3.0).view(per_image, 4, 5).transpose(0, 1).flatten(1)
        slots = 5 * per_image
        assert torch.equal((u_PS * slots).floor().long().sort(dim=1).values, torch.arange(slots).expand(4, slots))
        everywhere = (u_PS.flatten() * 4 * slots).floor().long()
        assert torch.equal(everywhere.sort().values, torch.arange(4 * slots))
        assert len({tuple(row.tolist()) for row in (u_PS * slots).floor()}) == 4, "each group in an order of its own"
    assert not torch.equal(t_UDB[0], t_UDB[1])


def test_drawn_times_keep_to_their_range_and_shift():
    t = DrawnTimes(shift=3.0, low=0.3, high=0.6)(40, 50, num_updates=1, iteration=0, seed=0)
    assert 0.3 <= t.min() < 0.301
    assert 0.599 < t.max() <= 0.6
    # shift 3 at u = 1/2 is 3/4: half of the times are later
    for shift, median in ((1.0, 0.5), (3.0, 0.75)):
        t = DrawnTimes(shift=shift)(40, 50, num_updates=1, iteration=0, seed=0)
        assert t.median().item() == pytest.approx(median, abs=2e-3)


def test_a_group_shares_its_times_where_it_is_told_to():
    t_DPG = DrawnTimes(per_image=2, is_shared=True)(6, 4, num_updates=1, iteration=0, seed=0)[0].view(2, 6, 4)
    assert torch.equal(t_DPG, t_DPG[:, :, :1].expand(2, 6, 4))
    u_PD = unshifted(t_DPG[:, :, 0].T, 3.0)
    assert torch.equal((u_PD * 2).floor().long().sort(dim=1).values, torch.arange(2).expand(6, 2))
    assert torch.equal((u_PD.flatten() * 12).floor().long().sort().values, torch.arange(12))


def test_drawn_times_are_functions_of_iteration_and_seed():
    def draws(iteration, seed):
        return DrawnTimes()(2, 3, num_updates=2, iteration=iteration, seed=seed).flatten().tolist()

    assert draws(1, 2) == draws(1, 2)
    assert len({tuple(draws(*numbers)) for numbers in ((1, 2), (2, 1), (0, 0), (1, 0), (0, 1))}) == 5
