"""A LoRA that training starts from, in adapters as they are trained here: of one rank and one scale.

    s B A = s' B' A'        B' = (s / s') B        rows of A' beyond a layer's own rank are new, columns of B' zeros

So the policy starts as the model with that LoRA, whatever ranks and scales it has.  The rank is the largest of its
layers', which are those that are trained; s', alpha / rank, is the config's, since what a learning rate means depends
on it.  Rows that are zeros in both factors would never learn, and are new ones too.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from fastgrpo.models.adaptation import Adaptation
from fastgrpo.models.adapter import Started
from fastgrpo.models.added_lora import LayerTerm
from fastgrpo.models.lora import LoRA, LoRAAdaptation, can_be_adapted, end_of
from fastgrpo.models.lora_files import read_lora
from fastgrpo.models.weight_files import some

_KEY = "adaptation.start"
Adapt = Callable[[nn.Module], Adaptation]


@dataclass(frozen=True)
class StartedLoRA:
    """``LoRA`` of the rank and layers of another, whose ``terms`` its adapters are when they are installed."""

    lora: LoRA
    terms: Mapping[str, LayerTerm]

    @classmethod
    def read(
        cls, adaptation: Adapt, pipeline_class: Any, model: str, shapes: Mapping[str, tuple[int, ...]]
    ) -> "Adapt | StartedLoRA":
        """What ``LoRA.start`` names, for a ``model`` whose weights have these shapes; where none does, ``adaptation``.

        ValueError, naming the layers, for a LoRA of another model or of layers on which none is trained.
        """
        start = getattr(adaptation, "start", None)
        if not isinstance(adaptation, LoRA) or start is None:
            return adaptation
        lora = adaptation
        terms = read_lora(start, pipeline_class, model, shapes, _KEY).terms
        linear = [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2]
        adaptable = {layer for layer in linear if can_be_adapted(layer)}
        if others := sorted(terms.keys() - adaptable):
            raise ValueError(
                f"{_KEY}={start} changes {len(others)} layers on which no adapters are trained, {some(others)}; "
                f"use model.lora={start}, which adds all of it to the frozen weights, and train new adapters"
            )
        rank = max(term.rank for term in terms.values())
        # as it was given where nothing changes: a run that goes on compares it
        alpha = lora.alpha if rank == lora.rank else lora.alpha / lora.rank * rank
        return cls(replace(lora, rank=rank, alpha=alpha, targets=_targets(terms.keys(), adaptable), start=None), terms)

    def __call__(self, transformer: nn.Module) -> LoRAAdaptation:
        adapted = self.lora(transformer)
        assert {name.rpartition(".lora_")[0] for name in adapted.trainable} == self.terms.keys()
        scale = self.lora.alpha / self.lora.rank
        with torch.no_grad():
            for layer, term in self.terms.items():
                a_RI, b_OR = (adapted.trainable[f"{layer}.lora_{letter}.weight"] for letter in "AB")
                is_new_R = ~(term.a_RI.any(dim=1) | term.b_OR.any(dim=0)).to(a_RI.device)
                own_a_RI = torch.where(is_new_R[:, None], a_RI[: term.rank], term.a_RI.to(a_RI))
                a_RI[: term.rank].copy_(own_a_RI)
                b_OR[:, : term.rank].copy_(term.b_OR.to(b_OR) * (term.scale / scale))
        settings = {"rank": self.lora.rank, "alpha": self.lora.alpha, "targets": list(self.lora.targets)}
        adapted.started = Started(settings, _digest(self.terms))
        return adapted


def _targets(layers: Collection[str], adaptable: set[str]) -> tuple[str, ...]:
    """Ends of the layers' names, where all layers that end so are among them; else whole names."""
    ends = {end_of(layer) for layer in layers}
    if {layer for layer in adaptable if end_of(layer) in ends} == set(layers):
        return tuple(sorted(ends))
    return tuple(sorted(layers))


def _digest(terms: Mapping[str, LayerTerm]) -> str:
    digest = sha256()
    for layer, term in sorted(terms.items()):
        digest.update(f"{layer} {term.rank} {term.scale}".encode())
        for factor in (term.a_RI, term.b_OR):
            digest.update(_bytes(factor))
    return digest.hexdigest()[:16]


def _bytes(factor: Tensor) -> bytes:
    return factor.float().contiguous().numpy().tobytes()
