"""Do both sides compute the same?  log_prob and gradient of a micro-batch, from equal weights and samples.

Our rollout makes the samples, with its noise search where the recipe has one, and both sides replay them; with
``train.gradients=reweight`` our gradient is the one that the rollout took.  Flow-GRPO's latents, log_probs and loss are
built by its own functions, so agreement says that the work that is timed is the same work.

Every side is checked as it is timed, against the other's in float32: so a side's figure is its own rounding and its own
mistakes.  Letters: B samples, T trained steps.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.flow_grpo.checkout import Checkout
from benchmarks.flow_grpo.peer import Peer
from benchmarks.flow_grpo.pipeline import MINIATURE, Size
from benchmarks.flow_grpo.recipe import MICRO_BATCH, NUM_STEPS, RECIPES, Job, our_config, our_setting
from benchmarks.flow_grpo.setting import Setting
from benchmarks.flow_grpo.their_update import TheirUpdate
from fastgrpo.assembly import build_trainer
from fastgrpo.trainer import Trainer
from fastgrpo.types import Samples, TrainedSteps

# so wide that rounding clips nothing
_CLIP_RANGE = 0.5
# the penalty is then as long as the rest of the gradient, and shows in bfloat16 when it is wrong
_KL_FACTOR = 30
# adapters that start at zero have no gradient for their first factor
_ADAPTER_STD = 0.02


@dataclass(frozen=True)
class Tolerance:
    """The most that a side's ratio and gradient may be off."""

    ratio: float
    gradient: float

    def __str__(self) -> str:
        return f"ratio {self.ratio:g}, gradients {self.gradient:g}"


# by the bits of the coarser side's significand, for the miniature. In float32, sums in another order make up to 3e-7
# of the ratio and 5e-6 of the gradients. bfloat16 rounds a value by up to 2^-9; the forty roundings of each block,
# forward and backward, add up as a random walk to 1.2% of the gradients without guidance, and to 3.8% and .001 of the
# ratio with guidance 4.5, which counts the difference of two velocities so often. Allowed is less than twice that.
# Mistakes are larger: guidance of 4 moves the gradients by 14 to 23%, a LoRA scale of 9/8 by 12 to 20%
_TOLERANCES = {
    24: Tolerance(ratio=1e-5, gradient=1e-5),
    11: Tolerance(ratio=2e-3 / 8, gradient=6e-2 / 8),
    8: Tolerance(ratio=2e-3, gradient=6e-2),
}
# TF32 leaves float32 the significand of float16
_MOST_BITS = {"cpu": 24, "cuda": 11}


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """max |ratio - 1| of their log_prob to ours; the distance of the gradients, as a share of the length of ours."""

    ratio_deviation: float
    gradient_difference: float
    tolerance: Tolerance
    # their gradient also goes through the unconditional branch, ours does not
    trains_unconditional: bool

    @property
    def holds(self) -> bool:
        same_gradient = self.trains_unconditional or self.gradient_difference <= self.tolerance.gradient
        return same_gradient and self.ratio_deviation <= self.tolerance.ratio


def agreement(checkout: Checkout, job: Job, output: Path, overrides: Sequence[str], setting: Setting) -> Agreement:
    """Both sides in this process, on one micro-batch: ours with ``overrides`` of the config, theirs in ``setting``."""
    recipe = RECIPES[job.recipe]
    job = replace(job, batches=1)
    config = our_config(
        job,
        [
            f"algorithm.objective.kl_coef={_KL_FACTOR * recipe.kl_coef}",
            *overrides,
            *recipe.checked_with,
            "train.optimizer_steps=1",
            "train.max_grad_norm=1e9",
            f"algorithm.objective.clip_range={_CLIP_RANGE}",
            f"output={output}",
        ],
    )
    trainer = build_trainer(config)
    generator = torch.Generator().manual_seed(job.seed)
    with torch.no_grad():
        for name, weight in trainer.model.trainable.items():
            if "lora_B" in name:
                weight.copy_(_ADAPTER_STD * torch.randn(weight.shape, generator=generator))
    theirs = Peer(checkout, replace(job, batches=2), setting)
    theirs.recipe = replace(recipe, clip_range=_CLIP_RANGE, kl_coef=_KL_FACTOR * recipe.kl_coef)
    peft = dict(theirs.transformer.named_parameters())
    their_weights = {name: peft[_peft_name(name)] for name in trainer.model.trainable}
    for name, weight in trainer.model.trainable.items():
        their_weights[name].data.copy_(weight.data)
    advantages_B = torch.linspace(-1, 1, MICRO_BATCH, device=trainer.model.device)
    trained, our_gradient = _ours(trainer, advantages_B)
    deviation, their_gradient = _theirs(theirs, trainer, trained, advantages_B, their_weights)
    coarser = min(setting, our_setting(config), key=lambda one: one.significand_bits)
    return Agreement(
        ratio_deviation=deviation,
        gradient_difference=_distance(their_gradient, our_gradient),
        tolerance=_tolerance(coarser, job.size, job.device),
        trains_unconditional=recipe.guidance_scale > 1 and not checkout.detaches_unconditional(recipe),
    )


def _tolerance(setting: Setting, size: Size, device: str) -> Tolerance:
    """The table's; more blocks make a longer random walk, and in the ratio a latent's elements average it."""
    one = _TOLERANCES[min(setting.significand_bits, _MOST_BITS[device])]
    growth = max(1.0, math.sqrt(size.num_layers / MINIATURE.num_layers))
    averaging = max(1.0, MINIATURE.resolution / size.resolution)
    return Tolerance(ratio=one.ratio * growth * averaging, gradient=one.gradient * growth)


def _peft_name(name: str) -> str:
    return f"base_model.model.{name.removesuffix('.weight')}.default.weight"


def _ours(trainer: Trainer, advantages_B: Tensor) -> tuple[TrainedSteps, dict[str, Tensor]]:
    """The samples, and the gradient that our update takes its step from."""
    samples = Samples.all_of(trainer.prompts.at(0), trainer.group_size)
    conditions = trainer.model.encode(samples.texts)
    noise = trainer.start_noise(samples, 0)
    shares = trainer.update.shares(len(samples), 0)
    trajectories = trainer.rollout(
        samples,
        conditions,
        noise,
        0,
        num_differentiated=trainer.update.num_differentiated(shares),
    )
    gradient: dict[str, Tensor] = {}

    def keep(*_: object) -> None:
        for name, weight in trainer.model.trainable.items():
            assert weight.grad is not None
            gradient[name] = weight.grad.clone()

    # divided by the number of its terms, and not clipped
    trainer.update.optimizer.register_step_pre_hook(keep)
    assert isinstance(trajectories.trained, TrainedSteps)
    trainer.update(trajectories.trained, conditions, advantages_B, shares, trajectories.gradients)
    return trajectories.trained, gradient


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
    peer.transformer.train()
    deviations = []
    for j in range(len(steps)):
        loss, ratio_B, _ = update.loss(batch, j, conditions)
        # a share of the accumulated loss, and in float16 scaled
        peer.accelerator.backward(loss)
        deviations.append((ratio_B.detach() - 1).abs().max())
    scale = peer.accelerator.scaler.get_scale() if peer.accelerator.scaler else 1.0
    gradient = {name: weight.grad / scale for name, weight in weights.items() if weight.grad is not None}
    return torch.stack(deviations).max().item(), gradient


def _distance(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """|first - second| / |second|, over all of their tensors."""
    assert first.keys() == second.keys(), "the sides train other weights"
    difference = sum((first[name].double() - value.double()).square().sum() for name, value in second.items())
    length = sum(value.double().square().sum() for value in second.values())
    return float((torch.as_tensor(difference) / length).sqrt())
