"""The distribution of a prompt's start noise, N(mean, std^2), from its condition.

    text -> layer norm -> linear, SiLU -> linear -> map [C, cells, cells], interpolated to [C, H, W]

The last layer begins at zero, so that the distribution begins at N(0, I) exactly.  What the network says, m and, where
the std is learned, s in (-1, 1), is scaled and put on the shell that a model knows noise from:

    k^2 = max_kl / (max_kl + q)             q = sum over elements of m^2 / 2 + max(s^2, (e^2s - 1) / 2 - s)
    (mean, std) = (k m, e^ks) / r           r^2 = mean over elements of (k m)^2 + e^2ks

so that E|z|^2 is that of plain noise, and KL(N(mean, std^2) || N(0, I)) = D (log r - mean of k s) stays below max_kl:
before the division it is at most k^2 q, and of all its multiples the one on the shell has the least.
Everything is in float64: ranks whose batches differ then draw the same noise.
Letters: B prompts or samples, L tokens, F the width of a text, C H W of a latent, D = C * H * W.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgrpo.algorithm.noise import NoiseDraw
from fastgrpo.loading import one_at_a_time
from fastgrpo.types import Conditions


@dataclass(frozen=True, kw_only=True)
class ProposalShape:
    """What a proposal is for, and what it computes: all but its weights."""

    channels: int
    text_width: int
    width: int
    cells: int
    learns_std: bool
    max_kl: float

    @property
    def values(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


class ProposalNetwork(nn.Module):
    """Conditions -> mean and std of their start noise; its first layer is a function of ``seed``."""

    def __init__(self, shape: ProposalShape, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        outputs = shape.channels * (2 if shape.learns_std else 1) * shape.cells**2
        with one_at_a_time:
            self.hidden = nn.Linear(shape.text_width, shape.width, dtype=torch.float64)
            self.map = nn.Linear(shape.width, outputs, dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            bound = shape.text_width**-0.5
            for weight in self.hidden.parameters():
                weight.copy_(torch.rand(weight.shape, generator=generator, dtype=torch.float64) * 2 * bound - bound)
            for weight in self.map.parameters():
                weight.zero_()

    def forward(self, conditions: Conditions, latent_shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Mean and std, float64 [B, C, H, W]."""
        said = self.map(F.silu(self.hidden(features(conditions)))).unflatten(1, (-1, *(self.shape.cells,) * 2))
        if said.shape[2:] != tuple(latent_shape[1:]):
            said = F.interpolate(said, size=tuple(latent_shape[1:]), mode="bilinear", align_corners=False)
        m_BCHW, *s_BCHW = said.split(self.shape.channels, dim=1)
        # a log std without a bound would leave nothing of the budget to any other element
        return bounded(m_BCHW, s_BCHW[0].tanh() if s_BCHW else torch.zeros_like(m_BCHW), self.shape.max_kl)

    @torch.no_grad()
    def moments(self, conditions: Conditions, latent_shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The same in float32, as noise is drawn with."""
        mean_BCHW, std_BCHW = self(conditions, latent_shape)
        return mean_BCHW.float(), std_BCHW.float()

    def starts(self, draw: NoiseDraw, stream: int, conditions_B: Conditions) -> Tensor:
        """Start noise of each of a draw's rows, whose conditions these are: float32 [B, C, H, W]."""
        return draw.around(stream, *self.moments(conditions_B, draw.latent_shape))

    def check_fits(self, latent_shape: Sequence[int], conditions: Conditions, where: str) -> None:
        """ValueError for a model of other latents or texts than the proposal was learned on."""
        asked = {"channels": latent_shape[0], "text_width": features(conditions).shape[1]}
        for name, value in asked.items():
            if value != (own := getattr(self.shape, name)):
                what = {"channels": "latent channels", "text_width": "elements of a text"}[name]
                raise ValueError(
                    f"{where} is a proposal for {own} {what}, and this model has {value}; use proposal=none, or one "
                    "that was learned with this model"
                )


def features(conditions: Conditions) -> Tensor:
    """What the network reads of a text, float64 [B, F]: its pooled embedding, or the mean of its tokens' without one.

    Both are normalized over their elements.
    """
    if conditions.pooled_BC.shape[1] > 0:
        text_BF = conditions.pooled_BC.double()
    else:
        embeds_BLC, lengths_B = conditions.embeds_BLC.double(), conditions.lengths_B
        is_text_BL = torch.arange(embeds_BLC.shape[1], device=lengths_B.device) < lengths_B[:, None]
        # what fills a row up may hold anything
        text_BLC = torch.where(is_text_BL[:, :, None], embeds_BLC, 0.0)
        text_BF = text_BLC.sum(dim=1) / lengths_B[:, None]
    return F.layer_norm(text_BF, text_BF.shape[1:])


def bounded(m_BCHW: Tensor, s_BCHW: Tensor, max_kl: float) -> tuple[Tensor, Tensor]:
    """Mean and std on the shell, less than ``max_kl`` nats from N(0, I): the formulas above."""
    of_std_BCHW = torch.maximum(s_BCHW.square(), 0.5 * torch.expm1(2 * s_BCHW) - s_BCHW)
    q_B = (0.5 * m_BCHW.square() + of_std_BCHW).sum(dim=(1, 2, 3), keepdim=True)
    k_B = (max_kl / (max_kl + q_B)).sqrt()
    mean_BCHW, std_BCHW = k_B * m_BCHW, torch.exp(k_B * s_BCHW)
    r_B = (mean_BCHW.square() + std_BCHW.square()).mean(dim=(1, 2, 3), keepdim=True).sqrt()
    return mean_BCHW / r_B, std_BCHW / r_B


def kl(mean_BCHW: Tensor, std_BCHW: Tensor) -> Tensor:
    """KL(N(mean, std^2) || N(0, I)) in nats, summed over elements: [B]."""
    each_BCHW = 0.5 * (mean_BCHW.square() + std_BCHW.square() - 1) - std_BCHW.log()
    return each_BCHW.sum(dim=(1, 2, 3))
