"""Gradients that the rollout takes of single samples, weighted by advantages, are those of a replay."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgrpo.algorithm.dynamics import CPS, Dynamics, FlowSDE, StepCoefficients
from fastgrpo.algorithm.objective.clipped_surrogate import ClippedSurrogate
from fastgrpo.algorithm.schedule import SD3Schedule
from fastgrpo.memory.batch_size import BatchSize
from fastgrpo.memory.batches import BatchSizes
from fastgrpo.models.adaptation import FullFineTuning
from fastgrpo.models.lora import LoRA
from fastgrpo.models.sd3 import StableDiffusion3
from fastgrpo.rollout import StepRollout
from fastgrpo.sampler import Sampler
from fastgrpo.step_replay import StepReplay
from fastgrpo.types import Noise, Prompts, Samples
from fastgrpo.update import Update

GRID = SD3Schedule(5)()
# a window with a deterministic step in it
STEPS = (1, 3)
PROMPTS = Prompts(["a red circle", "two blue squares"], ids=[0, 1])
GROUP_SIZE = 3
ADVANTAGES = torch.tensor([1.0, -0.5, -0.5, 2.0, -1.7, -0.3])


def make_model(weights: Path, adaptation=None, **settings) -> StableDiffusion3:
    model = StableDiffusion3(
        weights=str(weights),
        adaptation=adaptation or LoRA(rank=4),
        resolution=32,
        max_sequence_length=0,
        use_t5=False,
        **settings,
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in model.trainable.values():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.05)
    return model


def roll(
    model: StableDiffusion3,
    dynamics: Dynamics,
    num_differentiated: int = 0,
    micro_batch: int = 4,
    rows: Sequence[int] = range(6),
):
    """Of samples in the order of ``rows``."""
    start = torch.randn(6, *model.latent_shape, generator=torch.Generator().manual_seed(1))[list(rows)]
    samples = Samples(PROMPTS, GROUP_SIZE, tuple(rows))
    sampler = Sampler(model=model, grid=GRID, batch_sizes=BatchSizes.of(micro_batch))
    rollout = StepRollout(sampler=sampler, dynamics=dynamics, timesteps=lambda *_: STEPS, seed=3)
    noise = Noise(start, metrics={}, num_scored=0)
    return rollout(samples, model.encode(samples.texts), noise, 0, num_differentiated=num_differentiated)


def make_update(
    model: StableDiffusion3,
    dynamics: Dynamics,
    *,
    objective: ClippedSurrogate | None = None,
    learning_rate: float = 1.0,
    **settings,
) -> Update:
    objective = objective or ClippedSurrogate(1e-4, 0.0)
    return Update(
        model=model,
        replay=StepReplay(model=model, grid=GRID, dynamics=dynamics, objective=objective),
        optimizer=torch.optim.SGD(model.trainable.values(), lr=learning_rate, fused=True),
        max_grad_norm=1e9,
        batch_size=BatchSize(value=3, key="runtime.micro_batch"),
        seed=0,
        **{"optimizer_steps": 1} | settings,
    )


@pytest.mark.parametrize(
    ("dynamics", "settings"),
    [(FlowSDE(0.7), {}), (CPS(0.8), {"guidance_scale": 3.0}), (CPS(0.8), {"checkpointing": True})],
    ids=["FlowSDE", "CPS guided", "CPS checkpointing"],
)
def test_reweighted_gradients_are_those_of_a_replay(dynamics: Dynamics, settings: dict, tiny_weights: Path) -> None:
    steps, stats = [], []
    for reweights in (False, True):
        model = make_model(tiny_weights, **settings)
        before = [weight.detach().clone() for weight in model.trainable.values()]
        update = make_update(model, dynamics, reweights=reweights)
        shares = update.shares(6, 0)
        rolled = roll(model, dynamics, update.num_differentiated(shares))
        assert bool(rolled.gradients) == reweights
        conditions = model.encode(PROMPTS.texts).repeat(GROUP_SIZE)
        stats.append(update(rolled.trained, conditions, ADVANTAGES, shares, rolled.gradients))
        # plain gradient descent: the step is the gradient
        steps.append([old - weight for old, weight in zip(before, model.trainable.values(), strict=True)])
    replayed, reweighted = steps
    largest = max(step.abs().max().item() for step in replayed)
    assert largest > 1e-5
    for one, other in zip(replayed, reweighted, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-4 * largest)
    assert stats[1].grad_norm == pytest.approx(stats[0].grad_norm, rel=1e-3)
    assert stats[1].means["loss"] == pytest.approx(stats[0].means["loss"], abs=1e-6)
    assert stats[1].deviation == stats[0].deviation == 0.0


class Misreported(StepCoefficients):
    """A step that is not as probable as it says."""

    def step(self, *arguments):
        x_next, log_prob_B = super().step(*arguments)
        return x_next, log_prob_B + 0.5


def misreporting(grid: Sequence[float], step: int) -> StepCoefficients:
    """Of the two trained steps the second."""
    coefficients = FlowSDE(0.7)(grid, step)
    return Misreported(**vars(coefficients)) if step == STEPS[1] else coefficients


@pytest.mark.parametrize("reweights", [False, True])
def test_a_stored_log_prob_that_is_not_the_one_of_the_gradient_is_seen(reweights: bool, tiny_weights: Path) -> None:
    model = make_model(tiny_weights)
    update = make_update(model, misreporting, reweights=reweights)
    shares = update.shares(6, 0)
    rolled = roll(model, misreporting, update.num_differentiated(shares))
    conditions = model.encode(PROMPTS.texts).repeat(GROUP_SIZE)
    stats = update(rolled.trained, conditions, ADVANTAGES, shares, rolled.gradients)
    assert stats.deviation == pytest.approx(1 - math.exp(-0.5), rel=1e-5)
    assert stats.means["clip_fraction"] == 0.5


def test_taking_gradients_changes_no_trajectory(tiny_weights: Path) -> None:
    plain = roll(make_model(tiny_weights), FlowSDE(0.7))
    for count in (6, 3):
        differentiated = roll(make_model(tiny_weights), FlowSDE(0.7), count)
        torch.testing.assert_close(differentiated.images_BCHW, plain.images_BCHW, atol=1e-5, rtol=0)
        for one, other in zip(plain.trained.tensors, differentiated.trained.tensors, strict=True):
            torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-5)


def test_each_sample_has_the_gradient_that_it_has_alone(tiny_weights: Path) -> None:
    model = make_model(tiny_weights)
    rolled = roll(model, FlowSDE(0.7), 6)
    assert [part.log_prob_TB.shape[1] for part in rolled.gradients] == [4, 2]
    conditions = model.encode(PROMPTS.texts).repeat(GROUP_SIZE)
    for b in range(6):
        sample = rolled.trained.map(lambda part_TB, b=b: part_TB[:, b : b + 1])
        total = torch.zeros(())
        for place, step in enumerate(STEPS):
            v = model.velocity(sample.x_TBCHW[place], GRID[step], conditions[b : b + 1])
            log_prob_B, _ = FlowSDE(0.7)(GRID, step).log_prob(
                sample.x_TBCHW[place], v, sample.x_next_TBCHW[place], None
            )
            total = total + log_prob_B.sum()
        expected = torch.autograd.grad(total, list(model.trainable.values()), allow_unused=True, materialize_grads=True)
        found = [weight_B[b % 4] for weight_B in rolled.gradients[b // 4].weights]
        largest = max(gradient.abs().max().item() for gradient in expected)
        for ours, alone in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, alone, rtol=1e-3, atol=1e-4 * largest)


def test_with_more_optimizer_steps_the_first_is_reweighted_and_the_others_replay(tiny_weights: Path) -> None:
    moved, stats = [], []
    for reweights in (False, True):
        model = make_model(tiny_weights, guidance_scale=3.0)
        before = [weight.detach().clone() for weight in model.trainable.values()]
        settings: dict[str, Any] = {"optimizer_steps": 4, "reweights": reweights, "learning_rate": 1e-2}
        update = make_update(model, FlowSDE(0.7), **settings)
        shares = update.shares(6, 5)
        rows = [row for share in shares for row in share]
        rolled = roll(model, FlowSDE(0.7), update.num_differentiated(shares), rows=rows)
        # 6 samples are 2 + 2 + 1 + 1
        assert sum(part.log_prob_TB.shape[1] for part in rolled.gradients) == (2 if reweights else 0)
        conditions = model.encode(PROMPTS.texts).repeat(GROUP_SIZE).take(rows)
        stats.append(update(rolled.trained, conditions, ADVANTAGES[rows], shares, rolled.gradients))
        moved.append([old - weight for old, weight in zip(before, model.trainable.values(), strict=True)])
    largest = max(step.abs().max().item() for step in moved[0])
    for one, other in zip(*moved, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-3 * largest)
    assert stats[0].deviation == stats[1].deviation == 0.0
    # the later steps saw a policy that had moved; a term counts alike in whichever step
    assert stats[1].means["approx_kl"] == pytest.approx(stats[0].means["approx_kl"], rel=1e-2)
    assert stats[1].means["approx_kl"] > 0
    assert stats[1].means["clip_fraction"] == stats[0].means["clip_fraction"] > 0
    assert stats[1].means["loss"] == pytest.approx(stats[0].means["loss"], rel=1e-4)


def test_where_it_would_be_wrong_it_is_refused(tiny_weights: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.gradients=reweight needs algorithm\.objective\.kl_coef=0, got 0\.04"):
        make_update(make_model(tiny_weights), FlowSDE(0.7), reweights=True, objective=ClippedSurrogate())
    with pytest.raises(ValueError, match="gradients of single samples need adapters; use adaptation=lora"):
        roll(make_model(tiny_weights, FullFineTuning()), FlowSDE(0.7), 6)
