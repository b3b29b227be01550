"""Which weights of a transformer are trained, how they are sampled from fast, and how its frozen start is reached.

``LoRA`` (lora.py) and ``FullFineTuning`` are pieces: called on a transformer, they prepare it in place.
Letters: B samples.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from fastgrpo.models.adapter import NOT_STARTED, Started
from fastgrpo.models.sharding import Shards, gathered, summed_within_nodes, whole
from fastgrpo.types import Conditions

Inputs = tuple[Tensor, Conditions]
# (transformer, x_BCHW, conditions) -> v_BCHW at one time t
Forward = Callable[[nn.Module, Tensor, Conditions], Tensor]
# replaces tensors by their sums over the ranks
Sum = Callable[[list[Tensor]], None]


class Adaptation(ABC):
    """A transformer of which some weights are trained.

    trainable: those weights by name.  lora_config: peft's description of the adapters, empty where the weights
    themselves are trained.  is_frozen_outside_blocks: whether embeddings and modulations never change.  started: from
    which LoRA, if any.
    """

    transformer: nn.Module
    trainable: dict[str, nn.Parameter]
    description: str
    lora_config: dict[str, Any]
    is_frozen_outside_blocks: bool
    started: Started = NOT_STARTED

    @abstractmethod
    def merged(self) -> AbstractContextManager[None]:
        """Inside, adapters are part of the frozen weights, and nothing is computed for them alone.  Re-entrant."""

    def stack(self, groups: Iterable[Sequence[nn.Module]]) -> None:  # noqa: B027
        """Told which layers read one input, before anything runs: they may be one product."""

    def refresh(self) -> None:  # noqa: B027
        """Called before passes in which nothing is merged: what is derived from the trained weights follows them.

        They are seen to change by their version, which operations in place count up, but not those on ``.data`` nor a
        fused optimizer's: after such call ``torch.autograd.graph.increment_version``.
        """

    def by_sample(self, num_samples: int) -> AbstractContextManager[list[Tensor]]:
        """Inside, each of ``num_samples`` samples has trained weights of its own, in the order of ``trainable``."""
        raise ValueError("gradients of single samples need adapters; use adaptation=lora, or train.gradients=replay")

    @abstractmethod
    def shard(self, group: ProcessGroup | None) -> None:
        """Spread what is trained over the ranks of a group, or make it ready to be trained by this process alone."""

    def gathered(self) -> AbstractContextManager[None]:
        """Inside, this rank has all weights of the policy.  Re-entrant."""
        return nullcontext()

    @property
    def in_lockstep(self) -> bool:
        """Whether a forward pass now waits for one of every other rank, whose weights it needs."""
        return False

    def accumulating(self) -> AbstractContextManager[None]:
        """Inside, ranks sum gradients no more than memory asks for: others come before ``sum_gradients``."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss to that of each trained weight."""
        loss.backward()

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
    def merge_for_good(self) -> nn.Module:
        """A plain transformer that computes what the policy does; this one is spent."""


@dataclass(frozen=True, kw_only=True)
class FullFineTuning:
    """Train every weight.  The reference policy is a frozen copy: without ``keep_reference``, kl_coef must be 0.

    On several ranks weights, gradients, optimizer state and average are spread over all of them, or with
    ``shard_over`` ``node`` over those of a node, so that nodes exchange gradients alone,
    once an optimizer step.
    rollout_weights: ``gathered``, each rank holds all weights while it samples, or ``sharded``, block after block.
    """

    keep_reference: bool = True
    shard_over: str = "all"
    rollout_weights: str = "gathered"

    def __post_init__(self) -> None:
        for key, choices in (("shard_over", ("all", "node")), ("rollout_weights", ("gathered", "sharded"))):
            if getattr(self, key) not in choices:
                raise ValueError(f"adaptation.{key} must be {' or '.join(choices)}, got {getattr(self, key)!r}")

    def __call__(self, transformer: nn.Module) -> "FullAdaptation":
        return FullAdaptation(transformer, self)


class FullAdaptation(Adaptation):
    """A transformer whose weights are all trained, and perhaps a frozen copy of it."""

    def __init__(self, transformer: nn.Module, piece: FullFineTuning) -> None:
        self.transformer = transformer.requires_grad_(True)
        self.trainable = dict(transformer.named_parameters())
        self.description = f"FullFineTuning(keep_reference={piece.keep_reference})"
        self.lora_config = {}
        self.is_frozen_outside_blocks = False
        self._copy = deepcopy(transformer).requires_grad_(False) if piece.keep_reference else None
        self._piece = piece
        self._compute_dtype = next(transformer.parameters()).dtype
        self._plain_class = type(transformer)
        # of the ranks that share the weights, once they do
        self._mesh: DeviceMesh | None = None
        self._is_gathered = False

    def shard(self, group: ProcessGroup | None) -> None:
        # one process that trains the very weights that it computes with has nothing to spread
        if group is None and self._compute_dtype.itemsize >= torch.float32.itemsize:
            return
        device = next(iter(self.trainable.values())).device
        shards = Shards.over_ranks(group, device, within_node=self._piece.shard_over == "node")
        for transformer in (self.transformer, self._copy):
            if transformer is not None:
                shards(transformer, compute_dtype=self._compute_dtype)
        self._mesh = shards.mesh
        self.trainable = dict(self.transformer.named_parameters())

    @property
    def _is_sharded(self) -> bool:
        return isinstance(self.transformer, FSDPModule)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        if not self._is_sharded or self._is_gathered or self._piece.rollout_weights == "sharded":
            yield
            return
        with gathered(self.transformer):
            self._is_gathered = True
            try:
                yield
            finally:
                self._is_gathered = False

    @property
    def in_lockstep(self) -> bool:
        return self._mesh is not None and self._mesh.size() > 1 and not self._is_gathered

    def accumulating(self) -> AbstractContextManager[None]:
        # over the ranks of a node memory asks for it, over nodes nothing does
        has_copies = self._mesh is not None and self._mesh.ndim > 1
        return summed_within_nodes(self.transformer) if has_copies else nullcontext()

    def sum_gradients(self, sum_: Sum) -> None:
        # those of shards are sums since the backward pass
        if not self._is_sharded:
            super().sum_gradients(sum_)

    def merged(self) -> AbstractContextManager[None]:
        return nullcontext()

    def policy_and_reference(
        self, forward: Forward, policy: Inputs | None, reference: Inputs
    ) -> tuple[Tensor | None, Tensor]:
        if self._copy is None:
            raise ValueError("kl_coef > 0 needs the reference policy; set adaptation.keep_reference=true")
        v_policy = None if policy is None else forward(self.transformer, *policy)
        return v_policy, forward(self._copy, *reference)

    def merge_for_good(self) -> nn.Module:
        if not self._is_sharded:
            return self.transformer
        config: Any = self.transformer.config
        with torch.device("meta"):
            plain: nn.Module = self._plain_class.from_config(config)  # type: ignore[attr-defined]
        dtype = self._compute_dtype
        weights = {name: whole(weight.detach()).to(dtype) for name, weight in self.transformer.state_dict().items()}
        plain.load_state_dict(weights, assign=True)
        return plain


def join(first: Inputs, second: Inputs) -> Inputs:
    """The samples of both, in one batch."""
    return torch.cat([first[0], second[0]]), first[1].cat(second[1])


def split(v_BCHW: Tensor, num_first: int) -> tuple[Tensor | None, Tensor]:
    """What ``join`` joined; None in place of no samples."""
    return (v_BCHW[:num_first] if num_first else None), v_BCHW[num_first:]
