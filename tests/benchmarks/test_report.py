"""What the benchmarks compute from their measurements."""

import pytest
import torch

from benchmarks.noise_influence import start_noise_share


def test_share_of_the_start_noise_by_hand():
    # two start noises of one prompt, two trajectories each: means 2 and 6, variance 2 within each
    reward_PZE = torch.tensor([[[1.0, 3.0], [5.0, 7.0]]])
    # between: var(2, 6) = 8, less 2 / 2 that the trajectories alone would give
    assert start_noise_share(reward_PZE) == pytest.approx(7 / (7 + 2))


def test_share_is_all_or_nothing_at_the_ends():
    generator = torch.Generator().manual_seed(0)
    start_PZ1 = torch.randn(200, 8, 1, generator=generator)
    trajectory_PZE = torch.randn(200, 8, 4, generator=generator)
    assert start_noise_share(start_PZ1.expand(-1, -1, 4)) == pytest.approx(1.0)
    assert start_noise_share(trajectory_PZE) < 0.05
    assert start_noise_share(start_PZ1 + trajectory_PZE) == pytest.approx(0.5, abs=0.05)
