"""What rollout, update and evaluation know of a model: a few methods and its trainable weights.

Letters: B samples, C H W latent channels, height and width.  Images are float32 [B, 3, height, width] in [0, 1].
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from fastgrpo.resolution import Resolution
from fastgrpo.types import Conditions, Prompt, Time, as_prompts
from fastgrpo_kernels import GuidedVelocity


class FlowModel(Protocol):
    """A flow-matching image model and the weights of it that are trained."""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one latent, of an image in the model's own resolution."""

    def latent_shape_of(self, resolution: Resolution | None) -> tuple[int, int, int]:
        """The same of an image in another resolution; None is the model's own.

        Prompts may ask for others where the class says by ``image_sizes``, as PipelineModel does, which it draws.
        """

    @property
    def device(self) -> torch.device:
        """Where latents, conditions and images live."""

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """The trained weights (float32, or float64 if the model is) under names that a checkpoint keeps."""

    @property
    def fingerprint(self) -> str:
        """Says which frozen weights ``trainable`` belongs to: equal for equal weights and adaptation."""

    @property
    def has_two_branches(self) -> bool:
        """Whether guidance is classifier-free: a velocity with text and one without."""

    def encode(self, texts: Sequence[str]) -> Conditions:
        """Conditions of the texts, one row a text."""

    def check_texts(self, texts: Iterable[str]) -> None:
        """ValueError for a text that it cannot read; no encoder is needed."""

    def encode_ahead(self, texts: Sequence[str], *, is_shown: bool = True) -> int:
        """Encode texts that ``encode`` will be asked for, where conditions are kept on disk; how many were not there.

        ``is_shown`` shows how far it is.
        """

    def velocity(
        self, x_BCHW: Tensor, t: Time, conditions: Conditions, unconditional: Tensor | None = None
    ) -> Tensor | GuidedVelocity:
        """Velocity of the policy, with guidance both branches; only the conditional one has a gradient.

        ``unconditional`` is the other branch, where it is known.  Its text is empty, or where the class says
        ``takes_negative_prompts = True``, as PipelineModel does, that of ``conditions.negative``.
        """

    def velocity_and_reference(
        self, x_BCHW: Tensor, t: Time, conditions: Conditions, unconditional: Tensor | None = None
    ) -> tuple[Tensor | GuidedVelocity, Tensor | GuidedVelocity]:
        """``velocity``, and the same of the frozen start, which has no gradient."""

    def sampling(self, lossy: bool = False) -> AbstractContextManager[None]:
        """Inside, velocities have no gradient and cost less, and equal those outside but for rounding.  Re-entrant.

        ``lossy`` allows for more than rounding: for steps of which no log_prob is taken.
        """

    def by_sample(self, num_samples: int) -> AbstractContextManager[list[Tensor]]:
        """Inside, each sample of a batch has trained weights of its own: [B, ...] each, in the order of ``trainable``.

        Equal in value to the trained weights; a gradient by them is one a sample.  ValueError where there is no LoRA.
        """

    def shard(self, group: ProcessGroup | None) -> None:
        """Make it ready to be trained by the ranks of a group, or by this process alone; once, before ``trainable``.

        Where all weights are trained they are spread over the ranks, and kept in float32 whatever type the model
        computes in.  Adapters are copied: each rank has all of them.  ValueError for what cannot be spread.
        """

    def gathered(self) -> AbstractContextManager[None]:
        """Inside, this rank has all weights, and may call ``velocity`` as often as it likes.  Re-entrant."""

    @property
    def in_lockstep(self) -> bool:
        """Whether every rank must call ``velocity`` equally often now: weights are spread over ranks, not gathered."""

    def accumulating(self) -> AbstractContextManager[None]:
        """For each backward pass but the last before ``sum_gradients``: inside, ranks tell each other less."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss to that of each trained weight."""

    def sum_gradients(self, sum_: Callable[[list[Tensor]], None]) -> None:
        """Replace the gradient of each trained weight by its sum over the ranks, zeros where there is none.

        ``sum_`` replaces tensors by their sums, and is called at most once.
        """

    @property
    def has_lora(self) -> bool:
        """Whether the trained weights are adapters, which ``save_lora`` can write on their own."""

    def save_lora(self, directory: Path) -> None:
        """Write the adapters where diffusers' ``load_lora_weights`` finds them."""

    def save_merged(self, directory: Path) -> None:
        """Write a whole pipeline with the trained weights in it."""

    def decode(self, x_BCHW: Tensor) -> Tensor:
        """Images of latents at t = 0."""


def encoded(model: FlowModel, prompts: Sequence[Prompt | str]) -> Conditions:
    """Conditions of the prompts, of both branches of guidance where one of them has a negative text.

    ValueError for a model that has no use for that.
    """
    asked = as_prompts(prompts)
    conditions = model.encode([prompt.text for prompt in asked])
    if all(prompt.negative is None for prompt in asked):
        return conditions
    if not (model.has_two_branches and getattr(model, "takes_negative_prompts", False)):
        raise ValueError(f"{type(model).__name__} has no branch of guidance for a negative prompt; leave it out")
    return replace(conditions, negative=model.encode([prompt.negative or "" for prompt in asked]))


@dataclass(frozen=True)
class Started:
    """A LoRA that adapters started as.

    settings: what it decided, by keys of the config's group ``adaptation``.  digest: of its weights, "" without one.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    digest: str = ""


NOT_STARTED = Started()


def started(model: FlowModel) -> Started:
    """From which LoRA a model's weights started, if it is one that says so by an attribute ``started``."""
    found: Started = getattr(model, "started", NOT_STARTED)
    return found


def estimate_decoding(model: FlowModel) -> Callable[[Tensor], Tensor]:
    """What decodes the latents that a search's few steps lead to, whose images rewards alone see.

    A model may have a method ``decode_estimate`` for it, which costs less than ``decode``; none has to.
    """
    decoding: Callable[[Tensor], Tensor] = getattr(model, "decode_estimate", model.decode)
    return decoding
