"""Scores of candidates in order, for every search.  Letters: S searches, or prompts, K candidates of each."""

import torch
from torch import Tensor


def best_first(scores_SK: Tensor) -> Tensor:
    """The order of the candidates, [S, K]."""
    # stable, so that equal rewards keep the order of the candidates on every device
    return scores_SK.sort(dim=1, descending=True, stable=True).indices


def finite(scores_SK: Tensor) -> Tensor:
    """The scores in float32; ValueError unless all are finite."""
    # sorting puts NaN first: a failed reward would be taken for the best
    if not torch.isfinite(scores_SK).all():
        raise ValueError("a noise search was given rewards that are not finite; check the reward of noisy images")
    return scores_SK.float()
