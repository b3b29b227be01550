"""Which weights of a transformer are trained, and how its frozen start is reached.

``LoRA`` (lora.py) and ``FullFineTuning`` are pieces: called on a transformer, they prepare it in place.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Adaptation:
    """Trained weights by name; ``reference()`` is a context in which a transformer computes with the frozen start.

    ``lora_config`` is peft's description of the adapters, empty where the weights themselves are trained.
    """

    trainable: dict[str, nn.Parameter]
    reference: Callable[[], AbstractContextManager[nn.Module]]
    description: str
    lora_config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class FullFineTuning:
    """Train every weight.  The reference policy is a frozen copy: without ``keep_reference``, kl_coef must be 0."""

    keep_reference: bool = True

    def __call__(self, transformer: nn.Module) -> Adaptation:
        transformer.requires_grad_(True)
        copy = deepcopy(transformer).requires_grad_(False) if self.keep_reference else None

        def reference() -> AbstractContextManager[nn.Module]:
            if copy is None:
                raise ValueError("kl_coef > 0 needs the reference policy; set model.adaptation.keep_reference=true")
            return nullcontext(copy)

        return Adaptation(trainable=dict(transformer.named_parameters()), reference=reference, description=repr(self))
