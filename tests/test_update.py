"""One optimizer step follows the policy gradient as the papers write it; broken ones are skipped."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from fastgrpo.algorithm.dynamics import CPS, DanceSDE, Dynamics, FlowSDE
from fastgrpo.algorithm.objective import ClippedSurrogate
from fastgrpo.algorithm.schedule import SD3Schedule
from fastgrpo.memory.batch_size import BatchSize
from fastgrpo.memory.batches import BatchSizes
from fastgrpo.models.adaptation import FullFineTuning
from fastgrpo.models.lora import LoRA
from fastgrpo.models.sd3 import StableDiffusion3
from fastgrpo.rollout import Rollout
from fastgrpo.types import Conditions, Prompts, Samples, Trajectories
from fastgrpo.update import Update, UpdateStats

GRID = SD3Schedule(4)()
STEPS = (0, 1, 2)
PROMPTS = Prompts(["a red circle", "two blue squares"], ids=[0, 1])
GROUP_SIZE = 3
ADVANTAGES = torch.tensor([1.0, -0.5, -0.5, 2.0, -1.7, -0.3])
DYNAMICS = [FlowSDE(0.7), DanceSDE(0.3), CPS(0.8)]


class Recorder(torch.optim.SGD):
    """Keeps the gradients that it is asked to step along, and moves nothing."""

    def __init__(self, weights: Iterable[nn.Parameter]) -> None:
        super().__init__(weights, lr=0.0)
        self.gradients: list[list[Tensor]] = []

    def step(self, closure=None):
        # what a fused optimizer skips on the device
        if getattr(self, "found_inf", torch.zeros(())):
            return
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        self.gradients.append([torch.zeros(()) if g is None else g.clone() for g in gradients])


@dataclass
class Iteration:
    """A model that has trained before, and a rollout of it."""

    model: StableDiffusion3
    dynamics: Dynamics
    # diffusers' transformer with the weights that the model started from
    start: SD3Transformer2DModel
    conditions_B: Conditions
    trajectories: Trajectories

    def update(self, optimizer: torch.optim.Optimizer, **settings: Any) -> Update:
        update = Update(
            model=self.model,
            grid=GRID,
            dynamics=self.dynamics,
            objective=ClippedSurrogate(1e-4, 0.04),
            optimizer=optimizer,
            optimizer_steps=1,
            max_grad_norm=1e9,
            batch_size=BatchSize(value=2, key="runtime.micro_batch"),
            seed=0,
        )
        return replace(update, **settings)


def apply(update: Update, it: Iteration, advantages_B: Tensor, iteration: int) -> UpdateStats:
    """The update on a whole iteration, its samples in the order of the optimizer steps."""
    shares = update.shares(len(advantages_B), iteration)
    order = [row for share in shares for row in share]
    trained = it.trajectories.trained.map(lambda part_TB: part_TB[:, order])
    return update(trained, it.conditions_B.take(order), advantages_B[order], shares)


def roll(model: StableDiffusion3, dynamics: Dynamics, weights: Path) -> Iteration:
    reference = SD3Transformer2DModel.from_pretrained(weights / "transformer")
    start = torch.randn(6, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    samples = Samples.all_of(PROMPTS, GROUP_SIZE)
    conditions = model.encode(samples.texts)
    rollout = Rollout(model=model, grid=GRID, dynamics=dynamics, batch_sizes=BatchSizes.of(2), seed=3)
    return Iteration(model, dynamics, reference, conditions, rollout(samples, conditions, start, STEPS))


def make_iteration(weights: Path, dynamics: Dynamics, guidance_scale: float = 1.0, adaptation=None) -> Iteration:
    """Two iterations of training, so that adapters and the distance to the reference are no longer zero."""
    model = StableDiffusion3(
        weights=str(weights),
        adaptation=adaptation or LoRA(rank=4),
        resolution=64,
        guidance_scale=guidance_scale,
        max_sequence_length=0,
        use_t5=False,
    )
    optimizer = torch.optim.AdamW(model.trainable.values(), lr=1e-2, fused=True)
    for count in range(2):
        before = roll(model, dynamics, weights)
        apply(before.update(optimizer), before, ADVANTAGES, count)
    return roll(model, dynamics, weights)


def make_recorder(model: StableDiffusion3) -> Recorder:
    return Recorder(model.trainable.values())


@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
@pytest.mark.parametrize("dynamics", DYNAMICS, ids=lambda d: type(d).__name__)
def test_the_ratio_is_exactly_one_before_the_first_optimizer_step(
    dynamics: Dynamics, guidance_scale: float, tiny_weights: Path
) -> None:
    it = make_iteration(tiny_weights, dynamics, guidance_scale)
    stats = apply(it.update(make_recorder(it.model)), it, ADVANTAGES, 2)
    assert stats.ratio_deviation == 0.0
    assert stats.clip_fraction == 0.0
    assert stats.kl > 0


def velocity(it: Iteration, transformer: nn.Module, x: Tensor, t: float, conditions: Conditions) -> Tensor:
    """Guidance written out, its unconditional branch without gradient."""

    def forward(c: Conditions) -> Tensor:
        time = torch.full((1,), 1000 * t)
        return transformer(x[None], c.embeds_BLC, c.pooled_BC, time, return_dict=False)[0][0]

    v = forward(conditions)
    if it.model.guidance_scale == 1:
        return v
    v_empty = forward(it.model.encode([""])).detach()
    return v_empty + it.model.guidance_scale * (v - v_empty)


def mean_and_scale(dynamics: Dynamics, step: int, x: Tensor, v: Tensor) -> tuple[Tensor, float, float]:
    """(mean, std, scale that the divergence is divided by): the published formulas."""
    t, t_next = GRID[step], GRID[step + 1]
    dt = t_next - t
    if isinstance(dynamics, CPS):
        std = t_next * math.sin(0.8 * math.pi / 2)
        return (1 - t_next) * (x - t * v) + math.sqrt(t_next**2 - std**2) * (x + (1 - t) * v), std, std
    s = 0.3 if isinstance(dynamics, DanceSDE) else 0.7 * math.sqrt(t / (1 - (GRID[1] if t == 1 else t)))
    return x + (v + s**2 / (2 * t) * (x + (1 - t) * v)) * dt, s * math.sqrt(-dt), s


def expected_loss(
    it: Iteration, objective: ClippedSurrogate, samples: Iterable[int], advantages: Tensor = ADVANTAGES
) -> Tensor:
    """The mean over samples and trained steps of the clipped surrogate and the divergence, one sample at a time."""
    losses = []
    for b in samples:
        for place, step in enumerate(STEPS):
            x, x_next = it.trajectories.trained.x_TBCHW[place, b], it.trajectories.trained.x_next_TBCHW[place, b]
            conditions, t = it.conditions_B[b : b + 1], GRID[step]
            mean, std, scale = mean_and_scale(
                it.dynamics, step, x, velocity(it, it.model.transformer, x, t, conditions)
            )
            if isinstance(it.dynamics, CPS):
                log_prob = -(x_next - mean).square().mean()
            else:
                log_prob = torch.distributions.Normal(mean, std).log_prob(x_next).mean()
            with torch.no_grad():
                v_reference = velocity(it, it.start, x, t, conditions)
            mean_reference, _, _ = mean_and_scale(it.dynamics, step, x, v_reference)
            kl = (mean - mean_reference).square().mean() / (2 * scale**2)
            ratio = torch.exp(log_prob - it.trajectories.trained.log_prob_TB[place, b])
            clipped = torch.clamp(ratio, 1 - objective.clip_range, 1 + objective.clip_range)
            surrogate = torch.maximum(-advantages[b] * ratio, -advantages[b] * clipped)
            losses.append(surrogate + objective.kl_coef * kl)
    return torch.stack(losses).mean()


def expected_gradients(
    it: Iteration, objective: ClippedSurrogate, samples: Iterable[int], advantages: Tensor = ADVANTAGES
) -> list[Tensor]:
    loss = expected_loss(it, objective, samples, advantages)
    weights = list(it.model.trainable.values())
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    return [torch.zeros(()) if g is None else g for g in found]


def assert_same_gradients(ours: list[Tensor], expected: list[Tensor]) -> None:
    largest = max(g.abs().max().item() for g in expected)
    assert largest > 1e-5
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * largest)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
@pytest.mark.parametrize("dynamics", DYNAMICS, ids=lambda d: type(d).__name__)
def test_the_gradient_is_that_of_the_published_objective(
    dynamics: Dynamics, guidance_scale: float, tiny_weights: Path
) -> None:
    it = make_iteration(tiny_weights, dynamics, guidance_scale)
    objective = ClippedSurrogate(clip_range=1e-4, kl_coef=0.04)
    recorder = make_recorder(it.model)
    stats = apply(it.update(recorder, objective=objective), it, ADVANTAGES, 2)
    assert_same_gradients(recorder.gradients[0], expected_gradients(it, objective, range(6)))
    norm = torch.cat([g.flatten() for g in recorder.gradients[0]]).norm().item()
    assert stats.grad_norm == pytest.approx(norm, rel=1e-5)
    assert stats.loss == pytest.approx(expected_loss(it, objective, range(6)).item(), abs=1e-6)


def test_without_advantages_the_gradient_is_that_of_the_divergence(tiny_weights: Path) -> None:
    it = make_iteration(tiny_weights, FlowSDE(0.7))
    objective = ClippedSurrogate(clip_range=1e-4, kl_coef=100.0)
    recorder = make_recorder(it.model)
    apply(it.update(recorder, objective=objective), it, torch.zeros(6), 2)
    assert_same_gradients(recorder.gradients[0], expected_gradients(it, objective, range(6), torch.zeros(6)))


def test_clipped_samples_give_no_gradient(tiny_weights: Path) -> None:
    it = make_iteration(tiny_weights, FlowSDE(0.7))
    with torch.no_grad():
        for weight in it.model.trainable.values():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(7)), alpha=3e-2)
    objective = ClippedSurrogate(clip_range=2e-3, kl_coef=0.04)
    recorder = make_recorder(it.model)
    stats = apply(it.update(recorder, objective=objective), it, ADVANTAGES, 2)
    assert 0.1 < stats.clip_fraction < 0.9
    assert_same_gradients(recorder.gradients[0], expected_gradients(it, objective, range(6)))


def test_full_fine_tuning_follows_the_same_gradient(tiny_weights: Path) -> None:
    it = make_iteration(tiny_weights, FlowSDE(0.7), adaptation=FullFineTuning())
    objective = ClippedSurrogate(clip_range=1e-4, kl_coef=0.04)
    recorder = make_recorder(it.model)
    apply(it.update(recorder, objective=objective), it, ADVANTAGES, 2)
    assert_same_gradients(recorder.gradients[0], expected_gradients(it, objective, range(6)))


def test_micro_batches_of_different_sizes_count_by_their_samples(tiny_weights: Path) -> None:
    it = make_iteration(tiny_weights, FlowSDE(0.7))
    objective = ClippedSurrogate(clip_range=1e-4, kl_coef=0.04)
    results = []
    for micro_batch in (1, 4):
        recorder = make_recorder(it.model)
        batch_size = BatchSize(value=micro_batch, key="runtime.micro_batch")
        stats = apply(it.update(recorder, objective=objective, batch_size=batch_size), it, ADVANTAGES, 2)
        results.append((recorder.gradients[0], stats))
    (gradients, stats), (uneven_gradients, uneven_stats) = results
    assert_same_gradients(uneven_gradients, gradients)
    assert uneven_stats.loss == pytest.approx(stats.loss, abs=1e-5)
    assert uneven_stats.kl == pytest.approx(stats.kl, rel=1e-3)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_two_optimizer_steps_use_each_sample_once(guidance_scale: float, tiny_weights: Path) -> None:
    it = make_iteration(tiny_weights, FlowSDE(0.7), guidance_scale)
    objective = ClippedSurrogate(clip_range=1e-4, kl_coef=0.04)
    recorder = make_recorder(it.model)
    update = it.update(recorder, objective=objective, optimizer_steps=2)
    apply(update, it, ADVANTAGES, 2)
    shares = update.shares(6, 2)
    assert sorted([*shares[0], *shares[1]]) == list(range(6))
    assert len(shares[0]) == 3
    for gradients, share in zip(recorder.gradients, shares, strict=True):
        assert_same_gradients(gradients, expected_gradients(it, objective, share))


@pytest.mark.parametrize("micro_batch", [1, 2, 5, 6])
def test_what_an_optimizer_step_sees_does_not_depend_on_the_micro_batch(micro_batch: int, tiny_weights: Path) -> None:
    it = make_iteration(tiny_weights, FlowSDE(0.7), guidance_scale=3.0)
    results = []
    for size in (3, micro_batch):
        recorder = make_recorder(it.model)
        batch_size = BatchSize(value=size, key="runtime.micro_batch")
        apply(it.update(recorder, optimizer_steps=2, batch_size=batch_size), it, ADVANTAGES, 2)
        results.append(recorder.gradients)
    for gradients, expected in zip(*results, strict=True):
        assert_same_gradients(gradients, expected)


def test_an_update_that_does_not_fit_begins_its_share_anew_with_half_the_samples(
    tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = make_iteration(tiny_weights, FlowSDE(0.7))
    whole, halved = make_recorder(it.model), make_recorder(it.model)
    apply(it.update(whole), it, ADVANTAGES, 2)
    batch_size = BatchSize(value=4, key="runtime.micro_batch")
    update = it.update(halved, batch_size=batch_size)
    velocity_and_reference, calls = it.model.velocity_and_reference, []

    def in_little_memory(x_BCHW: Tensor, *arguments):
        calls.append(len(x_BCHW))
        # the fourth pass comes after gradients of the first batch are there
        if len(x_BCHW) == 4 and len(calls) == 4:
            raise torch.OutOfMemoryError("too many samples")
        return velocity_and_reference(x_BCHW, *arguments)

    monkeypatch.setattr(it.model, "velocity_and_reference", in_little_memory)
    apply(update, it, ADVANTAGES, 2)
    assert calls == [4] * 4 + [2] * 9
    assert batch_size.value == 2
    assert_same_gradients(halved.gradients[0], whole.gradients[0])


def test_the_ratio_before_the_first_step_is_not_blurred_by_later_ones(tiny_weights: Path) -> None:
    it = make_iteration(tiny_weights, FlowSDE(0.7))
    optimizer = torch.optim.AdamW(it.model.trainable.values(), lr=1e-2, fused=True)
    stats = apply(it.update(optimizer, optimizer_steps=3), it, ADVANTAGES, 2)
    assert stats.ratio_deviation == 0.0
    assert stats.clip_fraction > 0
    assert stats.approx_kl > 0


def test_shares_are_drawn_anew_each_iteration_and_alike_in_each_run(tiny_weights: Path) -> None:
    it = make_iteration(tiny_weights, FlowSDE(0.7))
    update = it.update(make_recorder(it.model), optimizer_steps=3)
    shares = [update.shares(6, iteration) for iteration in range(20)]
    assert all(sorted(row for share in iteration for row in share) == list(range(6)) for iteration in shares)
    assert len({str(iteration) for iteration in shares}) > 10
    again = it.update(make_recorder(it.model), optimizer_steps=3)
    assert [again.shares(6, i) for i in range(20)] == shares


def test_gradients_are_clipped_to_the_norm(tiny_weights: Path) -> None:
    it = make_iteration(tiny_weights, FlowSDE(0.7))
    recorder = make_recorder(it.model)
    stats = apply(it.update(recorder, max_grad_norm=1e-4), it, ADVANTAGES, 2)
    assert stats.grad_norm > 1e-3
    assert torch.cat([g.flatten() for g in recorder.gradients[0]]).norm().item() == pytest.approx(1e-4, rel=1e-2)


def test_a_gradient_that_is_not_finite_moves_nothing_and_is_counted(tiny_weights: Path) -> None:
    it = make_iteration(tiny_weights, FlowSDE(0.7))
    optimizer = torch.optim.AdamW(it.model.trainable.values(), lr=1e-2, fused=True)
    before = {name: weight.detach().clone() for name, weight in it.model.trainable.items()}
    advantages = ADVANTAGES.clone()
    advantages[3] = float("nan")
    stats = apply(it.update(optimizer), it, advantages, 2)
    assert stats.skipped_steps == 1
    assert math.isnan(stats.grad_norm)
    assert all(torch.equal(weight, before[name]) for name, weight in it.model.trainable.items())
    for state in optimizer.state_dict()["state"].values():
        assert state["step"] == 0
        assert not state["exp_avg"].any()
        assert not state["exp_avg_sq"].any()
    assert all(weight.grad is None for weight in it.model.trainable.values())


def test_only_the_broken_share_is_skipped(tiny_weights: Path) -> None:
    it = make_iteration(tiny_weights, FlowSDE(0.7))
    recorder = make_recorder(it.model)
    advantages = ADVANTAGES.clone()
    advantages[3] = float("inf")
    stats = apply(it.update(recorder, optimizer_steps=3), it, advantages, 2)
    assert stats.skipped_steps == 1
    assert len(recorder.gradients) == 2
    assert math.isfinite(stats.grad_norm)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer_steps": 0}, r"train\.optimizer_steps must be at least 1, got 0"),
        ({"max_grad_norm": 0.0}, r"train\.max_grad_norm must be positive, got 0\.0"),
        (
            {"optimizer_steps": 7},
            r"train\.optimizer_steps is 7 but an iteration has 6 samples, less than one in each step",
        ),
    ],
)
def test_wrong_settings_are_refused(settings: dict, message: str, tiny_weights: Path) -> None:
    it = make_iteration(tiny_weights, FlowSDE(0.7))
    with pytest.raises(ValueError, match=message):
        apply(it.update(make_recorder(it.model), **settings), it, ADVANTAGES, 0)


@pytest.mark.parametrize("dynamics", DYNAMICS, ids=lambda d: type(d).__name__)
def test_without_a_divergence_weight_the_reference_is_never_run(
    dynamics: Dynamics, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = make_iteration(tiny_weights, dynamics)
    objective = ClippedSurrogate(clip_range=1e-4, kl_coef=0.0)
    expected = expected_gradients(it, objective, range(6))
    monkeypatch.setattr(it.model, "velocity_and_reference", None)
    recorder = make_recorder(it.model)
    stats = apply(it.update(recorder, objective=objective), it, ADVANTAGES, 2)
    assert stats.kl == 0.0
    assert_same_gradients(recorder.gradients[0], expected)
