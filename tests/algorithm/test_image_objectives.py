"""Losses on images: their papers' formulas written out on tensors, and values computed by hand."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgrpo.algorithm.objective.images import ImageObjective, check_contract
from fastgrpo.algorithm.objective.matching_ratio import MatchingRatio
from fastgrpo.algorithm.objective.nft import NFT
from fastgrpo.algorithm.objective.weighted_regression import WeightedRegression
from fastgrpo_kernels import MatchingErrors, matching_loss

T_B = torch.tensor([0.9, 0.5, 0.2, 0.7, 0.4])
# clipped by max_advantage 2 at both ends, and one that is not trained on
ADVANTAGES = torch.tensor([3.0, -1.0, 0.0, 0.5, -2.5])


def draw(seed: int) -> Tensor:
    return torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


V_OLD, X_0, EPS, REFERENCE = (draw(seed) for seed in range(4))
V = V_OLD + 0.3 * draw(5)


def x_t(t_B: Tensor = T_B) -> Tensor:
    t = t_B.double()[:, None, None, None]
    return (1 - t) * X_0 + t * EPS


def mean(x: Tensor) -> Tensor:
    return x.flatten(1).mean(dim=1)


def nft_as_published(v: Tensor, beta: float, max_advantage: float, kl_coef: float) -> Tensor:
    """On images predicted from x_t, as the authors have it."""
    t = T_B.double()[:, None, None, None]
    r_B = (ADVANTAGES.double().clamp(-max_advantage, max_advantage) / max_advantage) / 2 + 0.5
    total_B = torch.zeros(5, dtype=torch.float64)
    for weight_B, sign in ((r_B, 1), (1 - r_B, -1)):
        predicted = x_t() - t * ((1 - sign * beta) * V_OLD + sign * beta * v)
        w_B = mean((predicted - X_0).abs()).clamp(min=1e-5).detach()
        total_B = total_B + weight_B * mean((predicted - X_0).square()) / w_B
    loss_B = max_advantage / beta * total_B + kl_coef * mean((v - REFERENCE).square())
    return torch.where(ADVANTAGES == 0, 0.0, loss_B)


def ratio_as_published(v: Tensor, clip_range: float, time_power: float, proximal: float, kl_coef: float) -> Tensor:
    """By cases in place of a maximum."""
    u = EPS - X_0
    log_ratio_B = T_B.double() ** time_power * (mean((V_OLD - u).square()) - mean((v - u).square()))
    loss = []
    for log_ratio, advantage in zip(log_ratio_B, ADVANTAGES.double(), strict=True):
        ratio = log_ratio.exp()
        if advantage > 0:
            loss.append(-advantage * ratio.clamp(max=1 + clip_range))
        else:
            loss.append(-advantage * ratio.clamp(min=1 - clip_range))
    loss_B = torch.stack(loss) + proximal * mean((v - V_OLD).square()) + kl_coef * mean((v - REFERENCE).square())
    return torch.where(ADVANTAGES == 0, 0.0, loss_B)


def regression_as_published(v: Tensor, proximal: float, kl_coef: float) -> Tensor:
    loss_B = ADVANTAGES.double() * mean((v - (EPS - X_0)).square())
    loss_B = loss_B + proximal * mean((v - V_OLD).square()) + kl_coef * mean((v - REFERENCE).square())
    return torch.where(ADVANTAGES > 0, loss_B, 0.0)


@pytest.mark.parametrize(
    ("objective", "published"),
    [
        (NFT(), lambda v: nft_as_published(v, 1.0, 2.0, 0.0)),
        (NFT(beta=0.1, max_advantage=5.0, kl_coef=0.3), lambda v: nft_as_published(v, 0.1, 5.0, 0.3)),
        (MatchingRatio(), lambda v: ratio_as_published(v, 0.2, 0.0, 0.0, 0.0)),
        (
            MatchingRatio(clip_range=0.05, time_power=2.0, proximal_coef=0.7, kl_coef=0.3),
            lambda v: ratio_as_published(v, 0.05, 2.0, 0.7, 0.3),
        ),
        (WeightedRegression(), lambda v: regression_as_published(v, 0.0, 0.0)),
        (WeightedRegression(proximal_coef=0.7, kl_coef=0.3), lambda v: regression_as_published(v, 0.7, 0.3)),
    ],
    ids=lambda value: str(value) if isinstance(value, NFT | MatchingRatio | WeightedRegression) else "",
)
def test_loss_and_gradient_are_those_of_the_paper(objective: ImageObjective, published) -> None:
    v = V.float().requires_grad_()
    errors = matching_loss(
        v, V_OLD.float(), X_0.float(), EPS.float(), beta=objective.beta, v_reference=REFERENCE.float()
    )
    loss_B, logged_B = objective(errors, T_B, ADVANTAGES)
    (gradient,) = torch.autograd.grad(loss_B.sum(), v)
    v_exact = V.clone().requires_grad_()
    expected_B = published(v_exact)
    (expected_gradient,) = torch.autograd.grad(expected_B.sum(), v_exact)
    torch.testing.assert_close(loss_B.double(), expected_B.detach(), rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-8)
    assert gradient[2].count_nonzero() == 0, "whose advantage is 0"
    torch.testing.assert_close(logged_B["drift"].double(), mean((V - V_OLD).square()), rtol=1e-6, atol=0)
    torch.testing.assert_close(logged_B["kl"].double(), mean((V - REFERENCE).square()), rtol=1e-6, atol=0)
    assert set(objective.names) == logged_B.keys()


def errors_of(**values: float) -> MatchingErrors:
    return MatchingErrors(*(torch.tensor([values.get(name, 0.0)]) for name in MatchingErrors._fields))


def test_nft_by_hand() -> None:
    # r = 3/4; t^2 plus / (t abs_plus) = .25 * .8 / (.5 * .4) = 1, t^2 minus / (t abs_minus) = .25 * .6 / (.5 * .5) = .6
    errors = errors_of(plus=0.8, minus=0.6, abs_plus=0.4, abs_minus=0.5, reference=2.0)
    loss_B, _ = NFT(beta=0.5, max_advantage=4.0, kl_coef=0.1)(errors, torch.tensor([0.5]), torch.tensor([2.0]))
    assert loss_B.item() == pytest.approx(4 / 0.5 * (0.75 * 1.0 + 0.25 * 0.6) + 0.1 * 2.0)
    # an image that is predicted exactly does not divide by 0: .25 * 4e-12 / 1e-5
    exact = errors_of(plus=4e-12, minus=4e-12, abs_plus=2e-6, abs_minus=2e-6)
    loss_B, _ = NFT(max_advantage=1.0)(exact, torch.tensor([0.5]), torch.tensor([1.0]))
    assert loss_B.item() == pytest.approx(1e-7)


@pytest.mark.parametrize(
    ("advantage", "plus", "expected", "outside"),
    [
        # ratio exp(.25 (old - plus)) with old 1
        (2.0, 1.0, -2.0, 0.0),
        (2.0, 0.8, -2.0 * math.exp(0.05), 0.0),
        (2.0, 0.2, -2.0 * 1.1, 1.0),
        (2.0, 2.0, -2.0 * math.exp(-0.25), 1.0),
        (-2.0, 2.0, 2.0 * 0.9, 1.0),
        (-2.0, 0.2, 2.0 * math.exp(0.2), 1.0),
        (0.0, 0.2, 0.0, 1.0),
    ],
)
def test_the_ratio_of_errors_is_clipped_where_it_gains(
    advantage: float, plus: float, expected: float, outside: float
) -> None:
    objective = MatchingRatio(clip_range=0.1, time_power=2.0)
    loss_B, logged_B = objective(errors_of(plus=plus, old=1.0), torch.tensor([0.5]), torch.tensor([advantage]))
    assert loss_B.item() == pytest.approx(expected)
    assert logged_B["clip_fraction"].item() == outside


def test_a_clip_range_of_more_than_one_bounds_the_ratio_from_above_alone() -> None:
    objective = MatchingRatio(clip_range=3.0)
    for plus, expected in ((9.0, -math.exp(-8.0)), (-9.0, -4.0)):
        loss_B, _ = objective(errors_of(plus=plus, old=1.0), torch.tensor([0.5]), torch.tensor([1.0]))
        assert loss_B.item() == pytest.approx(expected)


def test_matching_at_ratio_one_is_advantage_weighted_regression() -> None:
    u = EPS - X_0
    v = V_OLD.float().requires_grad_()
    errors = matching_loss(v, None, X_0.float(), EPS.float())
    loss_B, _ = MatchingRatio(time_power=1.0)(errors, T_B, ADVANTAGES)
    (gradient,) = torch.autograd.grad(loss_B.sum(), v)
    expected = (ADVANTAGES * T_B).double()[:, None, None, None] * 2 / 48 * (V_OLD - u)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-7)


class OwnLoss:
    """A loss of a user's own that keeps the contract; those below do not."""

    signal = "images"
    names: tuple[str, ...] = ("drift",)
    kl_coef = 0.0
    beta = 1.0

    def __call__(self, errors: MatchingErrors, t_B: Tensor, advantage_B: Tensor) -> Any:
        return advantage_B * errors.plus, {"drift": errors.drift}


class MeanLoss(OwnLoss):
    def __call__(self, errors: MatchingErrors, t_B: Tensor, advantage_B: Tensor) -> Any:
        return (advantage_B * errors.plus).mean(), {"drift": errors.drift}


class ColumnLoss(OwnLoss):
    def __call__(self, errors: MatchingErrors, t_B: Tensor, advantage_B: Tensor) -> Any:
        return advantage_B[:, None] * errors.plus, {"drift": errors.drift}


class LossAlone(OwnLoss):
    def __call__(self, errors: MatchingErrors, t_B: Tensor, advantage_B: Tensor) -> Any:
        return advantage_B * errors.plus


class LossWithoutGradient(OwnLoss):
    def __call__(self, errors: MatchingErrors, t_B: Tensor, advantage_B: Tensor) -> Any:
        return advantage_B * errors.abs_plus, {"drift": errors.drift}


class LogsTooLittle(OwnLoss):
    names = ("drift", "gap")


class LogsARunsOwn(OwnLoss):
    names = ("drift", "loss")

    def __call__(self, errors: MatchingErrors, t_B: Tensor, advantage_B: Tensor) -> Any:
        return advantage_B * errors.plus, {"drift": errors.drift, "loss": errors.plus}


class LogsAMean(OwnLoss):
    def __call__(self, errors: MatchingErrors, t_B: Tensor, advantage_B: Tensor) -> Any:
        return advantage_B * errors.plus, {"drift": errors.drift.mean()}


def test_what_keeps_the_contract_of_a_loss_passes() -> None:
    for objective in (OwnLoss(), NFT(), MatchingRatio(proximal_coef=1.0), WeightedRegression()):
        check_contract(objective)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("objective", "says"),
    [
        (MeanLoss, r"MeanLoss must give a number for each sample and its loss is \[\] for 4"),
        (ColumnLoss, r"ColumnLoss .* its loss is \[4, 4\] for 4"),
        (LossAlone, "LossAlone does not keep the contract of losses on images, .*: ValueError"),
        (LossWithoutGradient, "LossWithoutGradient has a loss without gradient: it must depend on errors.plus"),
        (LogsTooLittle, "LogsTooLittle does not keep the contract .*: KeyError"),
        (LogsARunsOwn, "LogsARunsOwn logs 'loss', which a run logs itself"),
        (LogsAMean, r"LogsAMean .* its 'drift' is \[\] for 4"),
    ],
)
def test_a_loss_that_does_not_keep_the_contract_is_refused(objective: type[OwnLoss], says: str) -> None:
    with pytest.raises(ValueError, match=f"^algorithm.objective {says}"):
        check_contract(objective())  # type: ignore[arg-type]
