"""The contract of losses that learn from images alone, on the forward process.

An image's latent x_0 is noised again at drawn (t, eps): x_t = (1 - t) x_0 + t eps, whose velocity is u = eps - x_0.
What a policy does there is judged by its errors, means over latent elements, one a sample:

    errors.plus, minus  of v_old +- beta (v - v_old) to u, squared; with beta 1 plus is that of v itself
    errors.old          of v_old to u, squared: no gradient
    errors.abs_plus, abs_minus      the same as plus and minus, but absolute: no gradient
    errors.drift        of v to v_old, squared
    errors.reference    of v to the reference policy's v, squared; 0 unless the objective has a kl_coef

An error of the predicted image x_t - t v is t^2 times the squared one, and t times the absolute one.  v_old is
the old policy's: that before the iteration's first optimizer step, or one that lags behind it (old_policy.py).
Letter: B samples at one (t, eps) each.
"""

from collections.abc import Mapping
from typing import Literal, Protocol

import torch
from torch import Tensor

from fastgrpo_kernels import MatchingErrors

# samples of a call that shows whether an objective keeps the contract
_MADE_UP = 4
# metrics that an iteration has whatever its objective
_RESERVED = frozenset(("loss", "grad_norm", "learning_rate", "optimizer_steps", "skipped_steps", "seconds", "images"))


class ImageObjective(Protocol):
    """A loss of one (t, eps) a sample."""

    @property
    def signal(self) -> Literal["images"]:
        """What it learns from."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of what is logged: drift and kl, errors.drift and errors.reference, and what else the loss has to say."""

    @property
    def kl_coef(self) -> float:
        """Weight of errors.reference in the loss; the reference policy runs where it is not 0."""

    @property
    def beta(self) -> float:
        """How far v+ and v- lie from v_old, in units of v - v_old."""

    def __call__(self, errors: MatchingErrors, t_B: Tensor, advantage_B: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss [B], differentiable in ``errors``, and what is logged of each sample [B]."""


def check_contract(objective: ImageObjective) -> None:
    """ValueError unless the objective, called on made-up errors, gives what the contract says."""
    name = f"algorithm.objective {type(objective).__name__}"
    errors = MatchingErrors(
        *(torch.linspace(0.1 * e, 1.0, _MADE_UP) for e in range(1, len(MatchingErrors._fields) + 1))
    )
    for error_B in (errors.plus, errors.minus, errors.drift, errors.reference):
        error_B.requires_grad_()
    times_B, advantages_B = torch.linspace(0.2, 0.8, _MADE_UP), torch.tensor([1.0, -1.0, 0.5, -0.5])
    try:
        names, _, _ = objective.names, objective.kl_coef, objective.beta
        loss_B, logged_B = objective(errors, times_B, advantages_B)
        shapes = {"its loss": loss_B.shape} | {f"its {logged!r}": logged_B[logged].shape for logged in names}
    except Exception as error:
        raise ValueError(
            f"{name} does not keep the contract of losses on images, fastgrpo/algorithm/objective/images.py: {error!r}"
        ) from error
    if reserved := _RESERVED.intersection(names):
        raise ValueError(f"{name} logs {min(reserved)!r}, which a run logs itself; give it another name in names")
    for what, shape in shapes.items():
        if shape != advantages_B.shape:
            raise ValueError(
                f"{name} must give a number for each sample and {what} is {list(shape)} for {_MADE_UP} of them"
            )
    if not loss_B.requires_grad:
        raise ValueError(
            f"{name} has a loss without gradient: it must depend on errors.plus, minus, drift or reference, undetached"
        )


def trained_alone(loss_B: Tensor, advantage_B: Tensor) -> Tensor:
    """0, penalties included, where the advantage is 0: such a sample is neither better nor worse than its group."""
    return torch.where(advantage_B == 0, torch.zeros_like(loss_B), loss_B)


def check_coefficient(key: str, value: float, remedy: str) -> None:
    """ValueError unless a weight of a penalty is finite and not negative."""
    if not 0 <= value < float("inf"):
        raise ValueError(f"algorithm.objective.{key} must be finite and not negative, got {value}; {remedy}")
