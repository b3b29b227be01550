"""What the stages of an iteration hand on: prompts -> conditions -> noise -> trajectories -> rewards.

Letters, used in names throughout the package:
    P prompts of an iteration, G samples of a prompt (the group)
    B = P * G samples, prompt-major: sample b belongs to prompt b // G
    K candidates of a noise search
    T trained steps of a trajectory, N steps of the schedule
    C, H, W channels, height and width of a latent or an image
    L text tokens (C is then the width of an embedding)
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prompts:
    """The P prompts of one iteration.  ``ids`` count prompt occurrences (iteration * P + p); noise is drawn by them."""

    texts: list[str]
    ids: list[int]

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.ids):
            raise ValueError(f"{len(self.texts)} texts but {len(self.ids)} ids; give every prompt one id")

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Conditions:
    """Encoded text, one row a prompt or a sample."""

    embeds_BLC: Tensor
    pooled_BC: Tensor

    def __len__(self) -> int:
        return len(self.embeds_BLC)

    def __getitem__(self, rows: slice | Tensor) -> "Conditions":
        return Conditions(self.embeds_BLC[rows], self.pooled_BC[rows])

    def repeat(self, group_size: int) -> "Conditions":
        """Each row ``group_size`` times in a row: conditions of prompts become conditions of samples."""
        return Conditions(
            self.embeds_BLC.repeat_interleave(group_size, dim=0), self.pooled_BC.repeat_interleave(group_size, dim=0)
        )

    def to(self, device: torch.device | str) -> "Conditions":
        return Conditions(self.embeds_BLC.to(device), self.pooled_BC.to(device))


@dataclass(frozen=True)
class Noise:
    """The start noises a proposal chose, and what its search measured.

    ``estimates_PG`` is the reward that the search estimated for each start noise: None where nothing was scored, NaN
    for a noise that was not.  Its rank correlation with the final rewards tells whether the search is informative.
    """

    start_BCHW: Tensor
    metrics: dict[str, float]
    num_scored: int
    estimates_PG: Tensor | None = None


@dataclass(frozen=True)
class Trajectories:
    """B images (float32, in [0, 1]) and the T trained steps that led to them; ``steps`` are indices into the grid."""

    images_BCHW: Tensor
    x_TBCHW: Tensor
    x_next_TBCHW: Tensor
    log_prob_TB: Tensor
    steps: tuple[int, ...]
    start_BCHW: Tensor

    def rows(self, rows: slice) -> "Trajectories":
        """Some of the samples, all of their steps."""
        return Trajectories(
            self.images_BCHW[rows],
            self.x_TBCHW[:, rows],
            self.x_next_TBCHW[:, rows],
            self.log_prob_TB[:, rows],
            self.steps,
            self.start_BCHW[rows],
        )


@dataclass(frozen=True)
class Rewards:
    """Each named reward, their weighted sum, and the sum that advantages are made of: that, or of normalized ones."""

    named: dict[str, Tensor]
    total_PG: Tensor
    learned_PG: Tensor
