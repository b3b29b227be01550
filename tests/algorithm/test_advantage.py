import math

import pytest
import torch

from fastgrpo.algorithm.advantage import GroupAdvantage

# group means 2 and 5; group stds sqrt(2/3) and sqrt(6); std of all six around 3.5: sqrt(33.5 / 6)
REWARDS_PG = torch.tensor([[1.0, 2.0, 3.0], [2.0, 5.0, 8.0]])


@pytest.mark.parametrize(
    ("std", "divisors"), [("none", (1, 1)), ("group", ((2 / 3) ** 0.5, 6**0.5)), ("global", ((33.5 / 6) ** 0.5,) * 2)]
)
def test_advantages_by_hand(std, divisors):
    eps = 0.0 if std == "none" else 1e-4
    a, b = divisors
    expected = torch.tensor([[-1 / (a + eps), 0, 1 / (a + eps)], [-3 / (b + eps), 0, 3 / (b + eps)]])
    torch.testing.assert_close(GroupAdvantage(std)(REWARDS_PG), expected)


@pytest.mark.parametrize("std", ["group", "global", "none"])
def test_a_group_of_equal_rewards_has_exactly_no_advantage(std):
    # the float32 mean of 24 times 0.1 is not 0.1
    rewards_PG = torch.stack([torch.full((24,), 0.1), torch.linspace(0, 1, 24)])
    advantage_PG = GroupAdvantage(std)(rewards_PG)
    assert advantage_PG[0].eq(0).all()
    assert advantage_PG[1].abs().max() > 0.4


def test_outliers_are_clamped():
    rewards_PG = torch.zeros(1, 100)
    rewards_PG[0, 7] = 1.0
    assert GroupAdvantage("group", clamp=5.0)(rewards_PG)[0, 7] == 5.0
    assert GroupAdvantage("group", clamp=math.inf)(rewards_PG)[0, 7] == pytest.approx(0.99 / (0.0099**0.5 + 1e-4))
