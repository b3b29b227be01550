"""How a proposal learns from the rewards that training computes anyway: by the score function, one step an iteration.

    loss = - mean over the samples that it drew of advantage * log N(z; mean, std^2)        summed over elements

z is the start noise that a sample got, and the advantage is what the policy learns from, so the group is the baseline.
Gradients are sums over samples, added up over the ranks, which keep equal weights.
Letters: P prompts, p of them on this rank, B samples of this rank, b of them that the proposal drew, G of a prompt.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fastgrpo.distributed.world import World
from fastgrpo.on_device import on_device
from fastgrpo.proposal.network import ProposalNetwork, kl
from fastgrpo.types import Conditions, Noise, Samples


class Learner(Protocol):
    """What the trainer knows of a proposal."""

    def moments(self, conditions: Conditions, latent_shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Mean and std of the start noise of each condition, float32 [B, C, H, W]."""

    def learn(
        self, samples: Samples, conditions_B: Conditions, noise: Noise, advantages_B: Tensor, rewards_PG: Tensor
    ) -> dict[str, float]:
        """One step, on all ranks together; its metrics.  ``rewards_PG`` are of all samples, on every rank."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that a resumed run needs."""

    @property
    def values(self) -> dict[str, Any]:
        """What the network is, as plain data; empty where there is none."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what a checkpoint holds."""


@dataclass(frozen=True)
class NothingLearned:
    """Where start noise is not learned: N(0, I)."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    def moments(self, conditions: Conditions, latent_shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        mean_BCHW = torch.zeros(len(conditions), *latent_shape, device=conditions.embeds_BLC.device)
        return mean_BCHW, torch.ones_like(mean_BCHW)

    def learn(
        self, samples: Samples, conditions_B: Conditions, noise: Noise, advantages_B: Tensor, rewards_PG: Tensor
    ) -> dict[str, float]:
        return {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        pass


class ProposalLearner:
    """A network and its Adam, whose averages are those of gradients: the weights have no average of their own."""

    def __init__(self, network: ProposalNetwork, learning_rate: float, world: World | None = None) -> None:
        self.network, self.world = network, world or World()
        self.optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
        for weight in network.parameters():
            # there from the beginning: a checkpoint then has the same names before and after the first step
            zeros = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[weight] = {"step": torch.zeros(()), **zeros}

    def moments(self, conditions: Conditions, latent_shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        return self.network.moments(conditions, latent_shape)

    def learn(
        self, samples: Samples, conditions_B: Conditions, noise: Noise, advantages_B: Tensor, rewards_PG: Tensor
    ) -> dict[str, float]:
        if not any(noise.learned_P):
            return {}
        num_samples = sum(noise.learned_P) * samples.group_size
        weights = list(self.network.parameters())
        kl_sum, gradients = self._own_part(samples, conditions_B, noise, advantages_B)
        # one sum over ranks carries them all
        together = [*gradients, kl_sum]
        self.world.sum_(together, "the proposal's gradients")
        torch._foreach_div_(together, num_samples)
        grad_norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        mean_kl, norm, gain = torch.stack([kl_sum, grad_norm, _gain(noise, rewards_PG)]).tolist()
        if math.isfinite(norm):
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        gained = {} if all(noise.learned_P) else {"proposal/gain": gain}
        return {"proposal/kl": mean_kl, "proposal/grad_norm": norm, **gained}

    def _own_part(
        self, samples: Samples, conditions_B: Conditions, noise: Noise, advantages_B: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """The KL of each sample that was drawn, and the gradient of the loss: sums over this rank's samples."""
        weights = list(self.network.parameters())
        prompts_B = [row // samples.group_size for row in samples.rows]
        rows_b = [b for b, prompt in enumerate(prompts_B) if noise.learned_P[prompt]]
        if not rows_b:
            return weights[0].new_zeros(()), [torch.zeros_like(weight) for weight in weights]
        first_row = {prompt: b for b, prompt in reversed(list(enumerate(prompts_B)))}
        own_p = sorted({prompts_B[b] for b in rows_b})
        device = noise.start_BCHW.device
        places_b = on_device(torch.tensor([own_p.index(prompts_B[b]) for b in rows_b]), device)
        index_b = on_device(torch.tensor(rows_b), device)
        with torch.enable_grad():
            mean_pCHW, std_pCHW = self.network(
                conditions_B.take([first_row[prompt] for prompt in own_p]), noise.start_BCHW.shape[1:]
            )
            log_prob_b = log_density(noise.start_BCHW[index_b].double(), mean_pCHW[places_b], std_pCHW[places_b])
            loss = -(advantages_B[index_b].double() * log_prob_b).sum()
            gradients = list(torch.autograd.grad(loss, weights))
        return kl(mean_pCHW.detach(), std_pCHW.detach())[places_b].sum(), gradients

    @property
    def values(self) -> dict[str, Any]:
        return self.network.shape.values

    @property
    def tensors(self) -> dict[str, Tensor]:
        found = {f"weights/{name}": weight.detach() for name, weight in self.network.named_parameters()}
        for name, weight in self.network.named_parameters():
            found |= {f"{key}/{name}": value for key, value in self.optimizer.state[weight].items()}
        return found

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])


def log_density(z_BCHW: Tensor, mean_BCHW: Tensor, std_BCHW: Tensor) -> Tensor:
    """log N(z; mean, std^2) but for a constant, summed over elements: [B]."""
    return (-0.5 * ((z_BCHW - mean_BCHW) / std_BCHW).square() - std_BCHW.log()).sum(dim=(1, 2, 3))


def _gain(noise: Noise, rewards_PG: Tensor) -> Tensor:
    """Mean reward of the prompts whose noise was learned, minus that of the others; NaN where there are none."""
    is_learned_P = on_device(torch.tensor(noise.learned_P), rewards_PG.device)
    mean_P = rewards_PG.double().mean(dim=1)
    return mean_P[is_learned_P].mean() - mean_P[~is_learned_P].mean()
