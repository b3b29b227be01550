import math

import pytest
import torch

from fastgrpo.algorithm.objective.clipped_surrogate import ClippedSurrogate

CLIP, KL_COEF = 0.1, 0.04


def independent_loss_and_gradients(log_prob, old, advantage, kl):
    """PPO's case distinction: outside the trust region on the improving side the loss is flat."""
    ratio = math.exp(log_prob - old)
    if advantage > 0 and ratio > 1 + CLIP:
        surrogate, slope = -advantage * (1 + CLIP), 0.0
    elif advantage < 0 and ratio < 1 - CLIP:
        surrogate, slope = -advantage * (1 - CLIP), 0.0
    else:
        surrogate, slope = -advantage * ratio, -advantage * ratio
    return surrogate + KL_COEF * kl, slope, KL_COEF


def test_loss_and_gradient_equal_the_case_distinction():
    log_ratio = torch.tensor([-0.5, -0.05, 0.0, 0.05, 0.5]).repeat_interleave(3)
    advantage_B = torch.tensor([-2.0, 0.0, 1.5]).repeat(5)
    old_B = torch.linspace(-3, 2, 15)
    log_prob_B = (old_B + log_ratio).requires_grad_()
    kl_B = torch.linspace(0, 1, 15).requires_grad_()
    # samples have nothing to do with each other: one at a time, and all at once
    objective, samples = ClippedSurrogate(CLIP, KL_COEF), (log_prob_B, old_B, advantage_B, kl_B)
    loss_B = torch.stack([objective(*(value[b : b + 1] for value in samples))[0] for b in range(15)])
    loss, _ = objective(*samples)
    gradients = torch.autograd.grad(15 * loss, [log_prob_B, kl_B])
    rows = zip(log_prob_B.tolist(), old_B.tolist(), advantage_B.tolist(), kl_B.tolist(), strict=True)
    expected = torch.tensor([independent_loss_and_gradients(*row) for row in rows]).T
    torch.testing.assert_close(torch.stack([loss_B.detach(), *gradients]), expected)
    torch.testing.assert_close(loss, loss_B.mean())


def test_on_policy_the_gradient_is_that_of_the_policy_gradient():
    log_prob_B = torch.tensor([-1.0, 0.3], requires_grad=True)
    advantage_B = torch.tensor([2.0, -3.0])
    loss, stats = ClippedSurrogate(1e-4, 0.0)(log_prob_B, log_prob_B.detach(), advantage_B, torch.zeros(2))
    (gradient_B,) = torch.autograd.grad(loss, log_prob_B)
    assert gradient_B.tolist() == [-1.0, 1.5]
    assert (stats.ratio_deviation.item(), stats.clip_fraction.item()) == (0, 0)


def test_stats_by_hand():
    old_B = torch.zeros(4)
    log_prob_B = torch.log(torch.tensor([1.0, 1.05, 0.7, 1.2]))
    _, stats = ClippedSurrogate(CLIP, KL_COEF)(log_prob_B, old_B, torch.ones(4), torch.tensor([0.0, 1.0, 2.0, 5.0]))
    assert stats.ratio_deviation.item() == pytest.approx(0.3)
    assert stats.clip_fraction.item() == 0.5
    assert stats.approx_kl.item() == pytest.approx((-0.05 - math.log(1.05 * 0.7 * 1.2)) / 4)
    assert stats.kl.item() == 2.0
