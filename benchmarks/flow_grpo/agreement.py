"""Do both sides compute the same?  log_prob and gradient of a micro-batch, from equal weights and samples.

Our rollout makes the samples, both sides replay them.  Flow-GRPO's latents, log_probs and loss are built by its own
functions, so agreement says that the work that is timed is the same work.
Letters: B samples, T trained steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.flow_grpo.checkout import Checkout
from benchmarks.flow_grpo.peer import Peer
from benchmarks.flow_grpo.recipe import MICRO_BATCH, NUM_STEPS, RECIPES, Job, our_trainer
from benchmarks.flow_grpo.their_update import TheirUpdate
from fastgrpo.trainer import Trainer
from fastgrpo.types import Samples, TrainedSteps

# of float32 on both sides; of bfloat16 against float16
_TOLERANCES = {"cpu": 1e-4, "cuda": 0.1}
# so wide that rounding clips nothing
_CLIP_RANGE = 0.5
# adapters that start at zero have no gradient for their first factor
_ADAPTER_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """max |ratio - 1| of their log_prob to ours; the distance of the gradients, as a share of the length of ours."""

    ratio_deviation: float
    gradient_difference: float
    tolerance: float
    # their gradient also goes through the unconditional branch, ours does not
    trains_unconditional: bool

    @property
    def holds(self) -> bool:
        same_gradient = self.trains_unconditional or self.gradient_difference <= self.tolerance
        return same_gradient and self.ratio_deviation <= self.tolerance


def agreement(checkout: Checkout, job: Job, output: Path) -> Agreement:
    """Both sides in this process, on one micro-batch."""
    recipe = RECIPES[job.recipe]
    job = replace(job, batches=1)
    overrides = (
        "train.optimizer_steps=1",
        "train.max_grad_norm=1e9",
        f"algorithm.objective.clip_range={_CLIP_RANGE}",
    )
    trainer = our_trainer(job, output, overrides)
    generator = torch.Generator().manual_seed(job.seed)
    for name, weight in trainer.model.trainable.items():
        if "lora_B" in name:
            weight.data.copy_(_ADAPTER_STD * torch.randn(weight.shape, generator=generator))
    theirs = Peer(checkout, replace(job, batches=2))
    theirs.recipe = replace(recipe, clip_range=_CLIP_RANGE)
    peft = dict(theirs.transformer.named_parameters())
    their_weights = {name: peft[_peft_name(name)] for name in trainer.model.trainable}
    for name, weight in trainer.model.trainable.items():
        their_weights[name].data.copy_(weight.data)
    advantages_B = torch.linspace(-1, 1, MICRO_BATCH, device=trainer.model.device)
    trained, our_gradient = _ours(trainer, advantages_B)
    deviation, their_gradient = _theirs(theirs, trainer, trained, advantages_B, their_weights)
    return Agreement(
        ratio_deviation=deviation,
        gradient_difference=_distance(their_gradient, our_gradient),
        tolerance=_TOLERANCES[job.device],
        trains_unconditional=recipe.guidance_scale > 1 and not checkout.detaches_unconditional(recipe),
    )


def _peft_name(name: str) -> str:
    return f"base_model.model.{name.removesuffix('.weight')}.default.weight"


def _ours(trainer: Trainer, advantages_B: Tensor) -> tuple[TrainedSteps, dict[str, Tensor]]:
    """The samples, and the gradient that our update takes its step from."""
    samples = Samples.all_of(trainer.prompts.at(0), trainer.group_size)
    conditions = trainer.model.encode(samples.texts)
    noise = trainer.start_noise(samples, 0)
    steps = trainer.algorithm.timesteps(NUM_STEPS, 0, trainer.seed)
    trained = trainer.rollout(samples, conditions, noise.start_BCHW, steps).trained
    gradient: dict[str, Tensor] = {}

    def keep(name: str, weight: Tensor) -> None:
        assert weight.grad is not None
        # called after every micro-batch: the last one has them all, added up
        gradient[name] = weight.grad.detach() / (len(samples) * len(steps))

    for name, weight in trainer.model.trainable.items():
        weight.register_post_accumulate_grad_hook(lambda weight, name=name: keep(name, weight))  # type: ignore[misc]
    trainer.update(trained, conditions, advantages_B, trainer.update.shares(len(samples), 0))
    return trained, gradient


def _theirs(
    peer: Peer, trainer: Trainer, trained: TrainedSteps, advantages_B: Tensor, weights: Mapping[str, Tensor]
) -> tuple[float, dict[str, Tensor]]:
    """max |ratio - 1| of their replay of our samples, and its gradient."""
    peer.pipeline.scheduler.set_timesteps(NUM_STEPS, device=peer.accelerator.device)
    update, steps = TheirUpdate(peer), list(trained.steps)
    embeds, pooled = peer.encode(trainer.prompts.at(0).texts * MICRO_BATCH)
    batch = {
        "prompt_embeds": embeds,
        "pooled_prompt_embeds": pooled,
        "timesteps": peer.pipeline.scheduler.timesteps[steps].repeat(MICRO_BATCH, 1),
        "latents": trained.x_TBCHW.transpose(0, 1),
        "next_latents": trained.x_next_TBCHW.transpose(0, 1),
        "log_probs": trained.log_prob_TB.T,
        "advantages": advantages_B[:, None].expand(-1, len(steps)),
    }
    conditions = update.conditions(batch)
    deviations = []
    for j in range(len(steps)):
        loss, ratio_B, _ = update.loss(batch, j, conditions)
        (loss / len(steps)).backward()
        deviations.append((ratio_B.detach() - 1).abs().max())
    gradient = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
    return torch.stack(deviations).max().item(), gradient


def _distance(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """|first - second| / |second|, over all of their tensors."""
    assert first.keys() == second.keys(), "the sides train other weights"
    difference = sum((first[name].double() - value.double()).square().sum() for name, value in second.items())
    length = sum(value.double().square().sum() for value in second.values())
    return float((torch.as_tensor(difference) / length).sqrt())
