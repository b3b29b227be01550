"""A flow whose velocity is a formula, as a model: what a search of it finds can be computed in a few lines.

Latents [1, 2, 2] become images [3, 2, 2]; each element is a sample of its own, so batches round nothing.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastgrpo.resolution import Resolution
from fastgrpo.types import Conditions
from fastgrpo_kernels import GuidedVelocity


def velocity(x: Tensor, t: float, text_length: Tensor | float) -> Tensor:
    """Bent, so that what is best by a look is not always best in the end."""
    return torch.sin(5.0 * x + 3.0 * t) + 0.3 * x - 0.05 * text_length


def decoded(x: Tensor) -> Tensor:
    """Images in [0, 1]."""
    return torch.sigmoid(2.0 * x).expand(-1, 3, -1, -1).contiguous()


def reward(images_BCHW: Tensor, prompts: list[str]) -> Tensor:
    """Brightness, least at the middle: many noises have much of it."""
    return (images_BCHW.mean(dim=(1, 2, 3)) - 0.5).abs() + 0.01 * torch.tensor([float(len(text)) for text in prompts])


@dataclass
class Field:
    """As much of a ``FlowModel`` as sampling knows; ``rows`` were computed in ``calls``, texts ``encoded``."""

    has_two_branches: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    in_lockstep: bool = False
    rows: int = 0
    calls: int = 0
    encoded: list[str] = field(default_factory=list)

    def latent_shape_of(self, resolution: Resolution | None) -> tuple[int, int, int]:
        return (1, 2, 2)

    def encode(self, texts: Sequence[str]) -> Conditions:
        self.encoded += texts
        lengths = torch.tensor([float(len(text)) for text in texts])
        return Conditions(lengths[:, None, None], torch.zeros(len(texts), 1))

    def velocity(
        self, x_BCHW: Tensor, t: float, conditions: Conditions, unconditional: Tensor | None = None
    ) -> Tensor | GuidedVelocity:
        self.calls += 1
        self.rows += len(x_BCHW) * (2 if self.has_two_branches else 1)
        v_BCHW = velocity(x_BCHW, t, conditions.embeds_BLC[:, :, None])
        return GuidedVelocity(v_BCHW, velocity(x_BCHW, t, 0.0), 2.0) if self.has_two_branches else v_BCHW

    def decode(self, x_BCHW: Tensor) -> Tensor:
        return decoded(x_BCHW)

    @contextmanager
    def sampling(self, lossy: bool = False) -> Iterator[None]:
        yield

    @contextmanager
    def gathered(self) -> Iterator[None]:
        yield
