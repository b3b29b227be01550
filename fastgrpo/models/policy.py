"""What a transformer with trained weights computes: velocities of the policy and of its frozen start.

Under gradient adapters are columns of the layers' products and only the conditional branch of guidance is
differentiated; for sampling they are merged into the weights and both branches are one batch.
Letters: B samples, C H W latent channels, height and width, M text tokens, E width of a modulation.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from fastgrpo.models.adaptation import Adaptation, Inputs, Sum, join
from fastgrpo.models.adapter import Started
from fastgrpo.models.lossy import Exact, Lossy
from fastgrpo.models.sharding import over
from fastgrpo.types import Conditions, Time
from fastgrpo_kernels import GuidedVelocity


class Network(Protocol):
    """The forward pass over a transformer's weights."""

    def __call__(self, transformer: Any, x_BCHW: Tensor, t: Time, conditions: Conditions) -> Tensor:
        """v [B, C, H, W] in the type of the conditions."""

    def stacks(self, transformer: Any) -> Iterator[Sequence[nn.Module]]:
        """Layers that read one input, and that it runs by ``projected``."""

    def modulations(self, transformer: Any, t: Time, conditions: Conditions) -> Iterator[Tensor]:
        """What depends on (t, prompt) alone."""

    def forward(
        self, transformer: Any, x_BCHW: Tensor, embeds_BMC: Tensor, lengths_B: Tensor, *modulations_BE: Tensor
    ) -> Tensor:
        """The rest, a function of tensors."""


class Compile(Protocol):
    """How blocks and decoding run: see ``fastgrpo.compile.blocks``."""

    def __call__(self, function: Any) -> Any:
        """What runs a function that is called often, or the function itself."""

    def forward(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """What runs a function of tensors alone, without gradient."""


class Uncompiled:
    """PyTorch's own kernels, one by one."""

    def __call__(self, function: Any) -> Any:
        return function

    def forward(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return function


class Policy(ABC):
    """The velocities of ``FlowModel``.

    guidance_scale: of classifier-free guidance, with a branch that knows no text; 1 turns it off.
    """

    # whether the other branch of guidance reads a text, which is the empty one where none is given
    takes_negative_prompts = True

    def __init__(
        self,
        *,
        adaptation: Adaptation,
        network: Network,
        guidance_scale: float,
        compile: Compile,
        lossy: Lossy | None,
    ) -> None:
        self.adaptation = adaptation
        self.guidance_scale = guidance_scale
        self._network = network
        adaptation.stack(network.stacks(adaptation.transformer))
        self._lossy = (lossy or Exact())(adaptation.transformer)
        self._can_be_lossy = lossy is not None and not isinstance(lossy, Exact)
        forward = partial(network.forward, adaptation.transformer)
        # two, since what is lossy computes something else with the same shapes
        self._sampled = [compile.forward(forward) for _ in range(2)]
        self._has_graphs = self._sampled[0] is not forward
        self._is_sampling = self._is_lossy = False
        # conditions of as many samples without text
        self._empty: dict[int, Conditions] = {}

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> Conditions:
        """Conditions of the texts, one row a text."""

    @property
    def has_two_branches(self) -> bool:
        """Whether guidance is classifier-free: a velocity with and one without text."""
        return self.guidance_scale != 1

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        return self.adaptation.trainable

    @property
    def has_lora(self) -> bool:
        return bool(self.adaptation.lora_config)

    @property
    def started(self) -> Started:
        return self.adaptation.started

    def shard(self, group: ProcessGroup | None) -> None:
        self.adaptation.shard(group)
        if not isinstance(self.adaptation.transformer, FSDPModule):
            return
        if self._has_graphs:
            raise ValueError(
                "compile=graphs reads weights where they were at capture, and those of shards move; use compile=blocks"
            )
        if self._can_be_lossy:
            with self.gathered():
                if any(isinstance(weight, DTensor) for weight in self.adaptation.transformer.parameters()):
                    raise ValueError(
                        "what is lossy is made of whole weights; use adaptation.rollout_weights=gathered, or lossy=none"
                    )

    def gathered(self) -> AbstractContextManager[None]:
        return self.adaptation.gathered()

    @property
    def in_lockstep(self) -> bool:
        return self.adaptation.in_lockstep

    def accumulating(self) -> AbstractContextManager[None]:
        return self.adaptation.accumulating()

    def backward(self, loss: Tensor) -> None:
        self.adaptation.backward(loss)

    def sum_gradients(self, sum_: Sum) -> None:
        self.adaptation.sum_gradients(sum_)

    @contextmanager
    def sampling(self, lossy: bool = False) -> Iterator[None]:
        if self._is_sampling:
            yield
            return
        # lossy weights are made of the merged ones, so that context is the inner one
        with torch.no_grad(), self.adaptation.merged(), self._lossy() if lossy else nullcontext():
            self._is_sampling, self._is_lossy = True, lossy
            try:
                yield
            finally:
                self._is_sampling = self._is_lossy = False

    def velocity(
        self, x_BCHW: Tensor, t: Time, conditions: Conditions, unconditional: Tensor | None = None
    ) -> Tensor | GuidedVelocity:
        if not self.has_two_branches:
            return self._conditional(x_BCHW, t, conditions)
        if self._is_sampling and unconditional is None:
            v_BCHW = self._run(
                self.adaptation.transformer, t, *join((x_BCHW, conditions), self._without_text(x_BCHW, conditions))
            )
            return self.guided(*v_BCHW.chunk(2))
        if unconditional is None:
            with torch.no_grad():
                unconditional = self._run(self.adaptation.transformer, t, *self._without_text(x_BCHW, conditions))
        return self.guided(self._conditional(x_BCHW, t, conditions), unconditional)

    def velocity_and_reference(
        self, x_BCHW: Tensor, t: Time, conditions: Conditions, unconditional: Tensor | None = None
    ) -> tuple[Tensor | GuidedVelocity, Tensor | GuidedVelocity]:
        def run(transformer: nn.Module, x_BCHW: Tensor, conditions: Conditions) -> Tensor:
            return self._run(transformer, t, x_BCHW, conditions)

        if not self.has_two_branches:
            with torch.no_grad():
                _, reference = self.adaptation.policy_and_reference(run, None, (x_BCHW, conditions))
            return self._conditional(x_BCHW, t, conditions), reference
        without_text = self._without_text(x_BCHW, conditions)
        with torch.no_grad():
            v_BCHW, reference = self.adaptation.policy_and_reference(
                run, without_text if unconditional is None else None, join((x_BCHW, conditions), without_text)
            )
        unconditional = v_BCHW if unconditional is None else unconditional
        assert unconditional is not None
        return self.guided(self._conditional(x_BCHW, t, conditions), unconditional), self.guided(*reference.chunk(2))

    def by_sample(self, num_samples: int) -> AbstractContextManager[list[Tensor]]:
        return self.adaptation.by_sample(num_samples)

    def _conditional(self, x_BCHW: Tensor, t: Time, conditions: Conditions) -> Tensor:
        """The branch that is differentiated; by the same kernels in rollout and update, so that they round alike.

        Without gradient attention and products run others, and what is compiled is another graph.
        """
        with torch.enable_grad() if not self._is_sampling else nullcontext():
            v_BCHW = self._run(self.adaptation.transformer, t, x_BCHW, conditions)
        return v_BCHW if torch.is_grad_enabled() else v_BCHW.detach()

    def guided(self, conditional: Tensor, unconditional: Tensor) -> Tensor | GuidedVelocity:
        """Of both branches [B, C, H, W], of which the first alone has a gradient."""
        return GuidedVelocity(conditional, unconditional, self.guidance_scale)

    def _without_text(self, x_BCHW: Tensor, conditions: Conditions) -> Inputs:
        """What the other branch of guidance is given: no text, or the negative one."""
        if conditions.negative is not None:
            return x_BCHW, conditions.negative
        count = len(x_BCHW)
        # the same in every step: neither looked up nor copied again
        if count not in self._empty:
            self._empty[count] = self.encode([""]).repeat(count)
        return x_BCHW, self._empty[count]

    def _run(self, transformer: nn.Module, t: Time, x_BCHW: Tensor, conditions: Conditions) -> Tensor:
        if not self._is_sampling:
            self.adaptation.refresh()
        if not self._is_sampling or isinstance(transformer, FSDPModule):
            return over(transformer, self._network, x_BCHW, t, conditions)
        modulations = self._network.modulations(transformer, t, conditions)
        return self._sampled[self._is_lossy](x_BCHW, conditions.embeds_BLC, conditions.lengths_B, *modulations)
