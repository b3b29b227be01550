"""Low-rank adaptation of a transformer's linear layers: y = W x + (alpha / rank) B A x.  arXiv:2106.09685.

A starts from N(0, 1 / rank^2), B from zero, as Flow-GRPO's adapters do.  Both are float32, float64 over a base that is.
For sampling, ``merged`` adds the product to W in place; W comes back bit for bit.  For how trained steps compute it
see ``low_rank.py``.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from fastgrpo.models.adaptation import Adaptation, Forward, Inputs, join, split
from fastgrpo.models.low_rank import LoRALinear, Mode, Projection, refresh, stack_frozen, unstack

# Flow-GRPO's targets in an MM-DiT: the joint attention of every block
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
# the parts of a block that targets are in, by their names in all families
_INSIDE = ("attn", "attention", "ff", "ff_context", "feed_forward", "img_mlp", "txt_mlp")
# layers of FLUX.1's single-stream blocks that are in none of these
_BESIDE = ("proj_mlp", "proj_out")


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Freeze a transformer and train adapters on ``targets``, ends of names of linear layers in its blocks.

    targets: also whole names of such layers.
    start: a directory or a .safetensors file of a LoRA that the adapters start as (``lora_start``); its rank and layers
        take the place of ``rank`` and ``targets``.  The reference policy, of KL, stays the transformer without
        adapters, as in Flow-GRPO: the base model, not the start.
    backup: where the frozen weights wait while the adapters are merged: ``device``, which costs the memory of the
    adapted layers once more, or ``host``, which costs their transfer at each merge.
    """

    rank: int = 32
    alpha: float = 64.0
    targets: tuple[str, ...] = ATTENTION
    seed: int = 42
    backup: str = "device"
    start: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.targets, str) or not self.targets or not all(self.targets):
            raise ValueError(f"adaptation.targets is a list of layers, as in [to_q,to_k], got {self.targets!r}")
        object.__setattr__(self, "targets", tuple(self.targets))
        if self.rank < 1:
            raise ValueError(
                f"adaptation.rank must be at least 1, got {self.rank}; use adaptation=full to train without LoRA"
            )
        if not 0 < self.alpha < math.inf:
            raise ValueError(
                f"adaptation.alpha must be positive and finite, got {self.alpha}; 2 * rank is the usual choice"
            )
        if self.backup not in ("device", "host"):
            raise ValueError(f"adaptation.backup must be device or host, got {self.backup!r}")

    def __call__(self, transformer: nn.Module) -> "LoRAAdaptation":
        """Install the adapters in place; ValueError if no layer matches the targets."""
        transformer.requires_grad_(False)
        generator = torch.Generator().manual_seed(self.seed)
        layers = [(name, module) for name, module in transformer.named_modules() if self._is_target(name, module)]
        if not layers:
            raise ValueError(
                f"adaptation.targets: LoRA found no linear layer named {', '.join(self.targets)}; correct them"
            )
        adapted: dict[str, LoRALinear] = {}
        for name, base in layers:
            assert isinstance(base, nn.Linear)
            adapted[name] = LoRALinear(base, self.rank, self.alpha / self.rank, generator)
            parent, _, child = name.rpartition(".")
            setattr(transformer.get_submodule(parent), child, adapted[name])
        return LoRAAdaptation(transformer, adapted, self)

    def _is_target(self, name: str, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) and (end_of(name) in self.targets or name in self.targets)


def end_of(layer: str) -> str:
    """What a target says of a layer: its name in the part of a block that it is in, "" in none."""
    parts = layer.split(".")
    inside = next((i for i, part in enumerate(parts) if part in _INSIDE), None)
    return "" if inside is None else ".".join(parts[inside + 1 :])


def can_be_adapted(layer: str) -> bool:
    """Whether a linear layer of this name is one that runs with its block: not an embedding, and no modulation."""
    *above, last = layer.split(".")
    return end_of(layer) != "" or (last in _BESIDE and bool(above))


class LoRAAdaptation(Adaptation):
    """A transformer with adapters; the reference policy is the same transformer without their terms."""

    def __init__(self, transformer: nn.Module, layers: dict[str, LoRALinear], lora: LoRA) -> None:
        self.transformer = transformer
        self.trainable = {
            f"{name}.lora_{letter}.weight": getattr(layer, f"lora_{letter}")
            for name, layer in layers.items()
            for letter in "AB"
        }
        self.description = f"LoRA(rank={lora.rank}, alpha={lora.alpha}, targets={lora.targets!r}, seed={lora.seed})"
        self.lora_config = {"r": lora.rank, "lora_alpha": lora.alpha, "target_modules": list(layers)}
        self.is_frozen_outside_blocks = True
        self._layers = list(layers.values())
        self._mode = Mode()
        self._backup = lora.backup
        self._frozen: list[Tensor] = []
        self._projections = [Projection([layer], self._mode) for layer in self._layers]

    def stack(self, groups: Iterable[Sequence[nn.Module]]) -> None:
        for group in groups:
            if frozen := [layer for layer in group if type(layer) is nn.Linear]:
                if len(frozen) == len(group):
                    stack_frozen(frozen)
                continue
            adapted = [layer for layer in group if isinstance(layer, LoRALinear)]
            if len(adapted) == len(group):
                self._projections = [one for one in self._projections if one.layers[0] not in adapted]
                self._projections.append(Projection(adapted, self._mode))

    def refresh(self) -> None:
        refresh(self._projections)

    def shard(self, group: ProcessGroup | None) -> None:
        """Nothing to do: adapters are small, and each rank has all of them."""

    def backward(self, loss: Tensor) -> None:
        # autograd would add hundreds of small gradients one by one
        weights = list(self.trainable.values())
        found = torch.autograd.grad(loss, weights, allow_unused=True)
        sums, added = [], []
        for weight, gradient in zip(weights, found, strict=True):
            if weight.grad is None:
                weight.grad = gradient
            elif gradient is not None:
                sums.append(weight.grad)
                added.append(gradient)
        if sums:
            torch._foreach_add_(sums, added)

    @contextmanager
    def merged(self) -> Iterator[None]:
        if self._mode.is_off:
            yield
            return
        for projection in self._projections:
            projection.check()
        weights = [layer.base.weight.detach() for layer in self._layers]
        # the frozen weights never change, so they are set aside once
        if not self._frozen:
            self._frozen = [self._set_aside(weight) for weight in weights]
        for layer in self._layers:
            layer.merge()
        self._mode.is_off = True
        try:
            yield
        finally:
            self._mode.is_off = False
            torch._foreach_copy_(weights, self._frozen, non_blocking=True)

    @contextmanager
    def by_sample(self, num_samples: int) -> Iterator[list[Tensor]]:
        weights = [(_copies(layer.lora_A, num_samples), _copies(layer.lora_B, num_samples)) for layer in self._layers]
        for layer, pair in zip(self._layers, weights, strict=True):
            layer.of_samples = pair
        try:
            yield [weight for pair in weights for weight in pair]
        finally:
            for layer in self._layers:
                layer.of_samples = None

    def policy_and_reference(
        self, forward: Forward, policy: Inputs | None, reference: Inputs
    ) -> tuple[Tensor | None, Tensor]:
        assert not self._mode.is_off, "merged adapters are in the reference too"
        if policy is None:
            self._mode.is_off = True
        else:
            gain_B = torch.zeros(len(policy[0]) + len(reference[0]), device=reference[0].device)
            gain_B[: len(policy[0])].fill_(1.0)
            self._mode.gain_B = gain_B
        try:
            v = forward(self.transformer, *(reference if policy is None else join(policy, reference)))
        finally:
            self._mode.is_off, self._mode.gain_B = False, None
        return split(v, 0 if policy is None else len(policy[0]))

    def merge_for_good(self) -> nn.Module:
        """Replace every adapted layer by one linear layer with W + scale * B A, in place: what ``export`` writes."""
        for name, module in list(self.transformer.named_modules()):
            if isinstance(module, LoRALinear):
                module.merge()
                parent, _, child = name.rpartition(".")
                setattr(self.transformer.get_submodule(parent), child, module.base)
        # what was stacked goes before each layer gets memory of its own
        self._layers, self._projections, self._frozen = [], [], []
        unstack(self.transformer)
        return self.transformer

    def _set_aside(self, weight: Tensor) -> Tensor:
        if self._backup == "device":
            return weight.clone()
        copy = torch.empty_like(weight, device="cpu", pin_memory=weight.is_cuda)
        return copy.copy_(weight)


def _copies(weight: Tensor, count: int) -> Tensor:
    """[count, ...] in the memory of one, which a gradient tells apart."""
    return weight.detach().expand(count, *weight.shape).requires_grad_()
