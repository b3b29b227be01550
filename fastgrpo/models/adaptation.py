"""Which weights of a transformer are trained, how they are sampled from fast, and how its frozen start is reached.

``LoRA`` (lora.py) and ``FullFineTuning`` are pieces: called on a transformer, they prepare it in place.
Letters: B samples.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastgrpo.types import Conditions

Inputs = tuple[Tensor, Conditions]
# (transformer, x_BCHW, conditions) -> v_BCHW at one time t
Forward = Callable[[nn.Module, Tensor, Conditions], Tensor]
# replaces tensors by their sums over the ranks
Sum = Callable[[list[Tensor]], None]


class Adaptation(ABC):
    """A transformer of which some weights are trained.

    trainable: those weights by name.  lora_config: peft's description of the adapters, empty where the weights
    themselves are trained.  is_frozen_outside_blocks: whether embeddings and modulations never change.
    """

    transformer: nn.Module
    trainable: dict[str, nn.Parameter]
    description: str
    lora_config: dict[str, Any]
    is_frozen_outside_blocks: bool

    @abstractmethod
    def merged(self) -> AbstractContextManager[None]:
        """Inside, adapters are part of the frozen weights, and nothing is computed for them alone.  Re-entrant."""

    def by_sample(self, num_samples: int) -> AbstractContextManager[list[Tensor]]:
        """Inside, each of ``num_samples`` samples has trained weights of its own, in the order of ``trainable``."""
        raise ValueError("gradients of single samples need adapters; use adaptation=lora, or train.gradients=replay")

    def gathered(self) -> AbstractContextManager[None]:
        """Inside, this rank has all weights of the policy.  Re-entrant."""
        return nullcontext()

    @property
    def in_lockstep(self) -> bool:
        """Whether a forward pass now waits for one of every other rank, whose weights it needs."""
        return False

    def sum_gradients(self, sum_: Sum) -> None:
        """Replace each gradient by its sum over the ranks; one that is not there counts, and is left, as zeros."""
        for weight in self.trainable.values():
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        sum_([weight.grad for weight in self.trainable.values() if weight.grad is not None])

    @abstractmethod
    def policy_and_reference(
        self, forward: Forward, policy: Inputs | None, reference: Inputs
    ) -> tuple[Tensor | None, Tensor]:
        """Velocities of the policy on some inputs, if any, and of the reference policy on others."""

    @abstractmethod
    def merge_for_good(self) -> None:
        """Leave a transformer without adapters that computes what the policy does."""


@dataclass(frozen=True, kw_only=True)
class FullFineTuning:
    """Train every weight.  The reference policy is a frozen copy: without ``keep_reference``, kl_coef must be 0."""

    keep_reference: bool = True

    def __call__(self, transformer: nn.Module) -> "FullAdaptation":
        return FullAdaptation(transformer, self)


class FullAdaptation(Adaptation):
    """A transformer whose weights are all trained, and perhaps a frozen copy of it."""

    def __init__(self, transformer: nn.Module, piece: FullFineTuning) -> None:
        self.transformer = transformer.requires_grad_(True)
        self.trainable = dict(transformer.named_parameters())
        self.description = repr(piece)
        self.lora_config = {}
        self.is_frozen_outside_blocks = False
        self._copy = deepcopy(transformer).requires_grad_(False) if piece.keep_reference else None

    def merged(self) -> AbstractContextManager[None]:
        return nullcontext()

    def policy_and_reference(
        self, forward: Forward, policy: Inputs | None, reference: Inputs
    ) -> tuple[Tensor | None, Tensor]:
        if self._copy is None:
            raise ValueError("kl_coef > 0 needs the reference policy; set adaptation.keep_reference=true")
        v_policy = None if policy is None else forward(self.transformer, *policy)
        return v_policy, forward(self._copy, *reference)

    def merge_for_good(self) -> None:
        pass


def join(first: Inputs, second: Inputs) -> Inputs:
    """The samples of both, in one batch."""
    return torch.cat([first[0], second[0]]), first[1].cat(second[1])


def split(v_BCHW: Tensor, num_first: int) -> tuple[Tensor | None, Tensor]:
    """What ``join`` joined; None in place of no samples."""
    return (v_BCHW[:num_first] if num_first else None), v_BCHW[num_first:]
