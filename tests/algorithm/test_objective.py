import math

import pytest
import torch

from fastgrpo.algorithm.objective.clipped_surrogate import ClippedSurrogate
from fastgrpo.algorithm.objective.flow_dppo import FlowDPPO
from fastgrpo.algorithm.objective.grpo_guard import GRPOGuard
from fastgrpo.algorithm.objective.steps import Replayed

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
    objective, samples = ClippedSurrogate(CLIP, KL_COEF), (log_prob_B, old_B, kl_B, torch.zeros(15))
    alone = [Replayed(log_prob_B[b, None], old_B[b, None], kl_B[b, None], torch.zeros(1)) for b in range(15)]
    loss_B = torch.stack([objective(one, advantage_B[b, None])[0] for b, one in enumerate(alone)])
    loss, _ = objective(Replayed(*samples), advantage_B)
    gradients = torch.autograd.grad(15 * loss, [log_prob_B, kl_B])
    rows = zip(log_prob_B.tolist(), old_B.tolist(), advantage_B.tolist(), kl_B.tolist(), strict=True)
    expected = torch.tensor([independent_loss_and_gradients(*row) for row in rows]).T
    torch.testing.assert_close(torch.stack([loss_B.detach(), *gradients]), expected)
    torch.testing.assert_close(loss, loss_B.mean())


def test_on_policy_the_gradient_is_that_of_the_policy_gradient():
    log_prob_B = torch.tensor([-1.0, 0.3], requires_grad=True)
    advantage_B = torch.tensor([2.0, -3.0])
    replayed = Replayed(log_prob_B, log_prob_B.detach(), torch.zeros(2), torch.zeros(2))
    loss, stats = ClippedSurrogate(1e-4, 0.0)(replayed, advantage_B)
    (gradient_B,) = torch.autograd.grad(loss, log_prob_B)
    assert gradient_B.tolist() == [-1.0, 1.5]
    assert (stats.ratio_deviation.item(), stats.clip_fraction.item()) == (0, 0)


def test_stats_by_hand():
    old_B = torch.zeros(4)
    log_prob_B = torch.log(torch.tensor([1.0, 1.05, 0.7, 1.2]))
    replayed = Replayed(log_prob_B, old_B, torch.tensor([0.0, 1.0, 2.0, 5.0]), torch.zeros(4))
    _, stats = ClippedSurrogate(CLIP, KL_COEF)(replayed, torch.ones(4))
    assert stats.ratio_deviation.item() == pytest.approx(0.3)
    assert stats.clip_fraction.item() == 0.5
    assert stats.approx_kl.item() == pytest.approx((-0.05 - math.log(1.05 * 0.7 * 1.2)) / 4)
    assert stats.kl.item() == 2.0


def test_chunks_follow_their_sizes_and_the_last_one_holds_for_the_rest():
    def sizes(*chunk_sizes, of):
        return [list(chunk) for chunk in ClippedSurrogate(chunk_sizes=chunk_sizes).chunks(of)]

    assert sizes(1, of=3) == [[0], [1], [2]]
    assert sizes(2, 3, of=9) == [[0, 1], [2, 3, 4], [5, 6, 7], [8]]
    assert sizes(4, of=3) == [[0, 1, 2]]


# a Gaussian step of std .2 in a time of .1: precision 12.5, and log_prob -12.5 mean (x_next - mean)^2
STEP = {"std": 0.2, "duration": 0.1, "precision": 12.5}


def gaussian_step(moved: float, z_E: torch.Tensor) -> Replayed:
    """Of one sample whose mean moved by ``moved`` everywhere; the old mean is 0."""
    mean_E = torch.full_like(z_E, moved, requires_grad=True)
    x_E = 0.2 * z_E
    log_prob = -12.5 * (x_E - mean_E).square().mean()
    old = -12.5 * x_E.square().mean()
    return Replayed(log_prob[None], old[None], torch.zeros(1), mean_E.square().mean()[None], **STEP)


@pytest.mark.parametrize("moved", [-0.03, 0.0, 0.02])
def test_the_normalized_ratio_is_linear_in_how_far_the_mean_moved(moved):
    z_E = torch.tensor([1.0, -0.5, 0.25, 2.0], dtype=torch.float64)
    replayed = gaussian_step(moved, z_E)
    loss, stats = GRPOGuard(clip_range=0.5)(replayed, torch.tensor([2.0]))
    ratio = math.exp(moved * z_E.mean().item())
    assert loss.item() == pytest.approx(-2.0 * ratio / 0.1, rel=1e-6)
    assert stats.ratio_deviation.item() == pytest.approx(abs(ratio - 1), rel=1e-6, abs=1e-12)
    # the same number of CPS, whose log_prob is without the variance
    cps = Replayed(
        replayed.log_prob_B / 12.5, replayed.old_log_prob_B / 12.5, replayed.kl_B, replayed.distance_B,
        std=0.2, duration=0.1, precision=1.0,
    )  # fmt: skip
    assert GRPOGuard(clip_range=0.5)(cps, torch.tensor([2.0]))[0].item() == pytest.approx(loss.item(), rel=1e-6)


def test_the_normalized_ratio_is_clipped_and_its_penalty_is_not_weighed_by_time():
    replayed = gaussian_step(0.5, torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    loss, stats = GRPOGuard(clip_range=0.25, kl_coef=0.5)(
        Replayed(**(vars(replayed) | {"kl_B": torch.tensor([3.0])})), torch.tensor([2.0])
    )
    assert loss.item() == pytest.approx(-2.0 * 1.25 / 0.1 + 0.5 * 3.0)
    assert stats.clip_fraction.item() == 1.0


@pytest.mark.parametrize(
    ("log_ratio", "distance", "advantage", "is_masked"),
    [
        # divergence is distance / .08, and .5 the bound
        (0.1, 0.03, 1.0, False),
        (0.1, 0.05, 1.0, True),
        (-0.1, 0.05, 1.0, False),
        (-0.1, 0.05, -1.0, True),
        (0.1, 0.05, -1.0, False),
        (0.0, 0.05, 1.0, False),
    ],
)
def test_a_step_too_far_from_the_old_policy_goes_no_further(log_ratio, distance, advantage, is_masked):
    log_prob_B = torch.tensor([log_ratio], requires_grad=True)
    replayed = Replayed(log_prob_B, torch.zeros(1), torch.tensor([2.0]), torch.tensor([distance]), **STEP)
    loss, stats = FlowDPPO(max_divergence=0.5, kl_coef=0.1)(replayed, torch.tensor([advantage]))
    (gradient_B,) = torch.autograd.grad(loss, log_prob_B)
    ratio = math.exp(log_ratio)
    assert loss.item() == pytest.approx(0.2 if is_masked else -advantage * ratio + 0.2, rel=1e-6)
    assert gradient_B.item() == pytest.approx(0.0 if is_masked else -advantage * ratio, rel=1e-6)
    assert stats.clip_fraction.item() == is_masked
    assert stats.approx_kl.item() == pytest.approx(ratio - 1 - log_ratio, abs=1e-7)
    assert stats.ratio_deviation.item() == pytest.approx(abs(ratio - 1), rel=1e-6)
    assert stats.kl.item() == 2.0


@pytest.mark.parametrize("objective", [ClippedSurrogate(), GRPOGuard(), FlowDPPO()])
def test_no_samples_have_no_loss(objective):
    nothing_B = torch.zeros(0)
    loss, stats = objective(Replayed(nothing_B, nothing_B, nothing_B, nothing_B, **STEP), nothing_B)
    assert loss.item() == 0.0
    assert [value.item() for value in stats] == [0.0] * 4
