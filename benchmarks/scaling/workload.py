"""Work of an image and sizes of weights, of published recipes at their published sizes.  FLOPs are modelled.

    rollout   steps x branches forward passes, and a decode
    update    trained steps x (a forward and a backward pass of the conditional branch; the branch without text, where
              it is not the rollout's; the reference's branches, where there is a penalty)

Sizes of weights are those of the architectures that ``model.weights=random`` builds, here made without storage.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.scaling.sharded import Unit, units_of
from fastgrpo.config import load_config
from fastgrpo.models.adaptation import FullFineTuning
from fastgrpo.pieces import build, find_target

# FLOPs, counted over the real graphs: a forward pass of one image of 512 x 512, one branch, 205 or 128 text tokens
_FORWARD = {"sd35_medium": 2.224e12, "flux_dev": 15.8e12}
_DECODE = 2.515e12
# of SD3.5-medium's backward pass where weights are frozen, counted too: the gradient by activations alone
_FROZEN_BACKWARD = 2.522 / 2.224
# as many products again for the gradient by weights
_FULL_BACKWARD = 2.0
_TEXTS = ("prompts.path=prompts.txt", "prompts.held_out=prompts.txt")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A recipe.  FLOPs are of one image and one branch; ``units`` are FSDP's, none where adapters are trained."""

    name: str
    num_weights: int
    units: tuple[Unit, ...]
    forward_flops: float
    backward_flops: float
    decode_flops: float
    num_steps: int
    branches: int
    has_reference: bool
    micro_batch: int
    optimizer_steps: int
    num_images: int = 1152
    num_rewards: int = 1

    @property
    def trained_steps(self) -> int:
        """All but the last, whose likelihood overflows."""
        return self.num_steps - 1

    @property
    def rollout_flops(self) -> float:
        """Of one image."""
        return self.num_steps * self.branches * self.forward_flops + self.decode_flops

    def update_flops(self, *, is_on_policy: bool) -> float:
        """Of one image in one optimizer step."""
        unknown = 0 if is_on_policy else self.branches - 1
        forwards = 1 + unknown + self.branches * self.has_reference
        return self.trained_steps * (forwards * self.forward_flops + self.backward_flops)

    @property
    def image_flops(self) -> float:
        """Of one image in rollout and update, the mean over optimizer steps."""
        updates = [self.update_flops(is_on_policy=step == 0) for step in range(self.optimizer_steps)]
        return self.rollout_flops + sum(updates) / len(updates)


def workloads() -> list[Workload]:
    """Flow-GRPO's recipes on SD3.5-medium, with adapters and with all weights, and on FLUX.1-dev; 48 x 24 images."""
    sd3, flux = ("experiment=flow_grpo_sd35", *_TEXTS), ("experiment=flow_grpo_flux", *_TEXTS)
    return [
        _workload("SD3.5-medium, LoRA", "sd35_medium", sd3, micro_batch=9),
        _workload("SD3.5-medium, all weights", "sd35_medium", (*sd3, "adaptation=full"), micro_batch=9),
        _workload("FLUX.1-dev, LoRA", "flux_dev", flux, micro_batch=3),
    ]


def _workload(name: str, model: str, overrides: tuple[str, ...], micro_batch: int) -> Workload:
    config = load_config("train", list(overrides))
    transformer, adaptation = meta_transformer(config), build(config.adaptation)
    is_full = isinstance(adaptation, FullFineTuning)
    forward = _FORWARD[model]
    return Workload(
        name=name,
        units=tuple(units_of(transformer)) if is_full else (),
        num_weights=num_trained(transformer, adaptation),
        forward_flops=forward,
        backward_flops=forward * (_FULL_BACKWARD if is_full else _FROZEN_BACKWARD),
        decode_flops=_DECODE,
        num_steps=config.algorithm.schedule.num_steps,
        # FLUX.1-dev's guidance is an input of the network
        branches=2 if model == "sd35_medium" else 1,
        has_reference=config.algorithm.objective.kl_coef > 0,
        micro_batch=micro_batch,
        optimizer_steps=config.train.optimizer_steps,
    )


def meta_transformer(config: Any) -> nn.Module:
    """The network of a config's architecture, of which only shapes are there."""
    family: Any = find_target(config.model._target_, "model")
    sizes = build(config.model.architecture).sizes("transformer", family.transformer_class)
    with torch.device("meta"):
        transformer: nn.Module = family.transformer_class(**sizes)
    return transformer


def num_trained(transformer: nn.Module, adaptation: Any) -> int:
    """Numbers in the weights that an adaptation trains."""
    return sum(weight.numel() for weight in adaptation(transformer).trainable.values())
