"""Sizes of a published model, and its parts in these sizes with random weights: what ``model.weights=random`` builds.

Text encoders are left out; conditions are random too, a function of the text (``random_weights``).
Letters: L text tokens, C width of an embedding.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgrpo.models.random_weights import random_embedding, random_module


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The sizes of a pipeline's transformer and autoencoder.

    transformer, autoencoder: as transformer/config.json and vae/config.json have them; what is left out is as in
    diffusers.  seed: of weights and conditions.
    """

    transformer: Mapping[str, Any]
    autoencoder: Mapping[str, Any]
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("transformer", "autoencoder"):
            if not isinstance(sizes := getattr(self, key), Mapping):
                raise ValueError(f"model.architecture.{key} has keys of its own, got {sizes!r}")
        if self.seed < 0:
            raise ValueError(f"model.architecture.seed must be at least 0, got {self.seed}")

    def sizes(self, key: str, module_class: type) -> dict[str, Any]:
        """All sizes of one of the two parts; ValueError for what its class does not take."""
        parameters = inspect.signature(module_class).parameters
        given: Mapping[str, Any] = getattr(self, key)
        if unknown := [name for name in given if name not in parameters]:
            raise ValueError(
                f"unknown key model.architecture.{key}.{unknown[0]}; {module_class.__name__} takes "
                f"{', '.join(parameters)}"
            )
        return {name: one.default for name, one in parameters.items() if one.default is not one.empty} | dict(given)

    def make(self, key: str, module_class: type, *, device: torch.device, dtype: torch.dtype) -> Any:
        """One of the two parts; ValueError for sizes that do not go together."""
        sizes = self.sizes(key, module_class)
        seed = self.seed + (key == "autoencoder")
        try:
            return random_module(lambda: module_class(**sizes), device=device, dtype=dtype, seed=seed)
        except torch.OutOfMemoryError:
            raise
        # whatever a constructor says of sizes that it cannot use
        except (ValueError, TypeError, RuntimeError, AssertionError, ArithmeticError, IndexError) as error:
            raise ValueError(
                f"model.architecture.{key}: {module_class.__name__} cannot be made in these sizes "
                f"({type(error).__name__}: {error}); correct them"
            ) from error

    def condition(
        self, text: str, num_tokens: int, widths: tuple[int, int], device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Random embeddings [1, L, C] and pooled embeddings [1, C] of a text."""
        embeds_BLC, pooled_BC = (
            random_embedding(text, *shape, seed=self.seed, dtype=dtype, device=device)
            for shape in ((1, num_tokens, widths[0]), (1, widths[1]))
        )
        return embeds_BLC, pooled_BC
