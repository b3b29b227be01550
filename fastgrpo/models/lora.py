"""Low-rank adaptation of a transformer's linear layers: y = W x + (alpha / rank) B A x.  arXiv:2106.09685.

A starts from N(0, 1 / rank^2), B from zero, as Flow-GRPO's adapters do.  A and B are float32 whatever the base's type.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgrpo.models.adaptation import Adaptation

# Flow-GRPO's targets in an MM-DiT: the joint attention of every block
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
FEED_FORWARD = ("net.0.proj", "net.2")


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Freeze a transformer and train adapters on ``targets``, ends of names of linear layers in its blocks."""

    rank: int = 32
    alpha: float = 64.0
    targets: tuple[str, ...] = ATTENTION
    seed: int = 42

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}; use adaptation=full to train without LoRA")
        if self.alpha <= 0:
            raise ValueError(f"alpha must be positive, got {self.alpha}; 2 * rank is the usual choice")

    def __call__(self, transformer: nn.Module) -> Adaptation:
        """Install the adapters in place; ValueError if no layer matches the targets."""
        transformer.requires_grad_(False)
        switch = _Switch()
        generator = torch.Generator().manual_seed(self.seed)
        layers = [(name, module) for name, module in transformer.named_modules() if self._is_target(name, module)]
        if not layers:
            raise ValueError(
                f"LoRA found no linear layer named {', '.join(self.targets)}; check model.adaptation.targets"
            )
        trainable: dict[str, nn.Parameter] = {}
        for name, base in layers:
            assert isinstance(base, nn.Linear)
            adapted = LoRALinear(base, self.rank, self.alpha / self.rank, switch, generator)
            parent, _, child = name.rpartition(".")
            setattr(transformer.get_submodule(parent), child, adapted)
            trainable[f"{name}.lora_A.weight"] = adapted.lora_A
            trainable[f"{name}.lora_B.weight"] = adapted.lora_B
        return Adaptation(
            trainable=trainable,
            reference=lambda: switch.off(transformer),
            description=repr(self),
            lora_config={"r": self.rank, "lora_alpha": self.alpha, "target_modules": [name for name, _ in layers]},
        )

    def _is_target(self, name: str, module: nn.Module) -> bool:
        parts = name.split(".")
        inside = next((i for i, part in enumerate(parts) if part in ("attn", "ff", "ff_context")), None)
        return isinstance(module, nn.Linear) and inside is not None and ".".join(parts[inside + 1 :]) in self.targets


@dataclass
class _Switch:
    """One flag that all adapters of a transformer read, so that the reference policy is one assignment away."""

    on: bool = field(default=True)

    @contextmanager
    def off(self, transformer: nn.Module) -> Iterator[nn.Module]:
        self.on = False
        try:
            yield transformer
        finally:
            self.on = True


class LoRALinear(nn.Module):
    """A frozen linear layer with a trained low-rank term."""

    def __init__(
        self, base: nn.Linear, rank: int, scale: float, switch: _Switch, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.base = base
        self.scale = scale
        self.switch = switch
        device = base.weight.device
        a_RI = torch.randn(rank, base.in_features, generator=generator) / rank
        self.lora_A = nn.Parameter(a_RI.to(device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if not self.switch.on:
            return y
        return y + self.scale * F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))


@torch.no_grad()
def merge(transformer: nn.Module) -> nn.Module:
    """Replace every adapted layer by one linear layer with W + scale * B A, in place: what ``export`` writes."""
    for name, module in list(transformer.named_modules()):
        if isinstance(module, LoRALinear):
            weight = module.base.weight
            weight.copy_(weight.float() + module.scale * module.lora_B @ module.lora_A)
            parent, _, child = name.rpartition(".")
            setattr(transformer.get_submodule(parent), child, module.base)
    return transformer
