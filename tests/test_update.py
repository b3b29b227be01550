"""Every optimizer step follows the policy gradient as the papers write it; broken ones are skipped."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from fastgrpo.algorithm.dynamics import CPS, DanceSDE, Dynamics, FlowSDE
from fastgrpo.algorithm.objective.clipped_surrogate import ClippedSurrogate
from fastgrpo.algorithm.objective.steps import StepObjective
from fastgrpo.algorithm.schedule import SD3Schedule
from fastgrpo.assembly import build_trainer
from fastgrpo.memory.batch_size import BatchSize
from fastgrpo.memory.batches import BatchSizes
from fastgrpo.models.adaptation import FullFineTuning
from fastgrpo.models.lora import LoRA
from fastgrpo.models.sd3 import StableDiffusion3
from fastgrpo.rollout import StepRollout
from fastgrpo.sampler import Sampler
from fastgrpo.step_replay import StepReplay
from fastgrpo.types import Conditions, Noise, Prompts, Samples, TrainedSteps, Trajectories
from fastgrpo.update import Update, UpdateStats
from tests.tiny_config import make_config

GRID = SD3Schedule(6)()
# a window that begins late, with a deterministic step in it
STEPS = (1, 3)
PROMPTS = Prompts(["a red circle", "two blue squares"], ids=[0, 1])
GROUP_SIZE = 3
ADVANTAGES = torch.tensor([1.0, -0.5, -0.5, 2.0, -1.7, -0.3])
SDE = FlowSDE(0.7)
ADAPTERS = LoRA(rank=4)
OBJECTIVE = ClippedSurrogate(clip_range=1e-4, kl_coef=0.04)


class Recorder(torch.optim.SGD):
    """Keeps the weights and the gradients of the steps that it is asked to take."""

    def __init__(self, model: StableDiffusion3, lr: float = 0.0) -> None:
        super().__init__(model.trainable.values(), lr=lr, fused=True)
        self.weights: list[list[Tensor]] = []
        self.gradients: list[list[Tensor]] = []

    def step(self, closure=None):
        # what a fused optimizer skips on the device
        if getattr(self, "found_inf", torch.zeros(())):
            return
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.weights.append([p.detach().clone() for p in parameters])
        self.gradients.append([torch.zeros(()) if p.grad is None else p.grad.clone() for p in parameters])
        super().step(closure)


@dataclass
class Iteration:
    """A model whose adapters are not zero, and a rollout of it."""

    model: StableDiffusion3
    dynamics: Dynamics
    # diffusers' transformer with the weights that the model started from
    start: SD3Transformer2DModel
    conditions_B: Conditions
    trajectories: Trajectories[TrainedSteps]

    def update(self, optimizer: torch.optim.Optimizer, objective: StepObjective = OBJECTIVE, **settings: Any) -> Update:
        update = Update(
            model=self.model,
            replay=StepReplay(model=self.model, grid=GRID, dynamics=self.dynamics, objective=objective),
            optimizer=optimizer,
            optimizer_steps=1,
            max_grad_norm=1e9,
            batch_size=BatchSize(value=2, key="runtime.micro_batch"),
            seed=0,
        )
        return replace(update, **settings)


def apply(update: Update, it: Iteration, advantages_B: Tensor = ADVANTAGES) -> UpdateStats:
    """The update on a whole iteration, its samples in the order of the optimizer steps."""
    shares = update.shares(len(advantages_B), iteration=2)
    order = [row for share in shares for row in share]
    trained = it.trajectories.trained.map(lambda part_TB: part_TB[:, order])
    return update(trained, it.conditions_B.take(order), advantages_B[order], shares)


@cache
def load(weights: Path, adaptation: LoRA | FullFineTuning, guidance_scale: float) -> tuple[StableDiffusion3, list]:
    """A model, and weights for it that have left their start."""
    model = StableDiffusion3(
        weights=str(weights),
        adaptation=adaptation,
        resolution=32,
        guidance_scale=guidance_scale,
        max_sequence_length=0,
        use_t5=False,
    )
    generator = torch.Generator().manual_seed(5)
    moved = [p.detach() + 0.05 * torch.randn(p.shape, generator=generator) for p in model.trainable.values()]
    return model, moved


def set_weights(model: StableDiffusion3, weights: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for parameter, weight in zip(model.trainable.values(), weights, strict=True):
            parameter.copy_(weight)


def make_iteration(
    weights: Path,
    dynamics: Dynamics = SDE,
    guidance_scale: float = 1.0,
    adaptation: LoRA | FullFineTuning = ADAPTERS,
    *,
    keeps_means: bool = False,
) -> Iteration:
    model, moved = load(weights, adaptation, guidance_scale)
    set_weights(model, moved)
    start = torch.randn(6, *model.latent_shape, generator=torch.Generator().manual_seed(1))
    samples = Samples.all_of(PROMPTS, GROUP_SIZE)
    conditions = model.encode(samples.texts)
    sampler = Sampler(model=model, grid=GRID, batch_sizes=BatchSizes.of(2))
    rollout = StepRollout(
        sampler=sampler, dynamics=dynamics, timesteps=lambda *_: STEPS, seed=3, keeps_means=keeps_means
    )
    trajectories = rollout(samples, conditions, Noise(start, metrics={}, num_scored=0), 0)
    reference = SD3Transformer2DModel.from_pretrained(weights / "transformer")
    return Iteration(model, dynamics, reference, conditions, trajectories)


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
    s = 0.3 if isinstance(dynamics, DanceSDE) else 0.7 * math.sqrt(t / (1 - t))
    return x + (v + s**2 / (2 * t) * (x + (1 - t) * v)) * dt, s * math.sqrt(-dt), s


def expected_terms(
    it: Iteration, objective: ClippedSurrogate, samples: Iterable[int], advantages: Tensor = ADVANTAGES
) -> tuple[Tensor, Tensor]:
    """Losses (clipped surrogate and divergence) and log ratios by the weights as they are, each step of each sample."""
    losses, log_ratios = [], []
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
            log_ratio = log_prob - it.trajectories.trained.log_prob_TB[place, b]
            ratio = log_ratio.exp()
            clipped = torch.clamp(ratio, 1 - objective.clip_range, 1 + objective.clip_range)
            surrogate = torch.maximum(-advantages[b] * ratio, -advantages[b] * clipped)
            losses.append(surrogate + objective.kl_coef * kl)
            log_ratios.append(log_ratio.detach().double())
    return torch.stack(losses), torch.stack(log_ratios)


def gradients_of(it: Iteration, losses: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(losses.mean(), list(it.model.trainable.values()), allow_unused=True)
    return [torch.zeros(()) if g is None else g for g in found]


def assert_same_gradients(ours: list[Tensor], expected: list[Tensor]) -> None:
    largest = max(g.abs().max().item() for g in expected)
    assert largest > 1e-5
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * largest)


@pytest.mark.parametrize(
    ("dynamics", "guidance_scale", "adaptation"),
    [
        (SDE, 4.5, ADAPTERS),
        (DanceSDE(0.3), 1.0, ADAPTERS),
        (CPS(0.8), 4.5, ADAPTERS),
        (SDE, 1.0, FullFineTuning()),
    ],
    ids=lambda value: str(value) if isinstance(value, float) else type(value).__name__,
)
def test_the_ratio_is_exactly_one_and_the_gradient_that_of_the_published_objective(
    dynamics: Dynamics, guidance_scale: float, adaptation: LoRA | FullFineTuning, tiny_weights: Path
) -> None:
    it = make_iteration(tiny_weights, dynamics, guidance_scale, adaptation)
    recorder = Recorder(it.model)
    stats = apply(it.update(recorder), it)
    losses, _ = expected_terms(it, OBJECTIVE, range(6))
    assert_same_gradients(recorder.gradients[0], gradients_of(it, losses))
    norm = torch.cat([g.flatten() for g in recorder.gradients[0]]).norm().item()
    assert stats.grad_norm == pytest.approx(norm, rel=1e-5)
    assert stats.means["loss"] == pytest.approx(losses.mean().item(), rel=1e-5, abs=1e-6)
    assert stats.means["kl"] > 0
    assert stats.deviation == stats.means["clip_fraction"] == 0.0
    # a tenth of the clip range
    assert (stats.deviation_name, stats.max_deviation) == ("ratio_deviation", pytest.approx(1e-5))
    assert stats.num_terms == 2


@pytest.mark.parametrize(
    ("dynamics", "objective"),
    [(SDE, ClippedSurrogate(1e-3, 0.04)), (CPS(0.8), ClippedSurrogate(1e-3, 0.0))],
    ids=["FlowSDE", "CPS"],
)
def test_each_of_several_optimizer_steps_follows_the_gradient_on_the_weights_that_it_finds(
    dynamics: Dynamics, objective: ClippedSurrogate, tiny_weights: Path
) -> None:
    it = make_iteration(tiny_weights, dynamics, guidance_scale=3.0)
    recorder = Recorder(it.model, lr=2e-2)
    update = it.update(recorder, objective=objective, optimizer_steps=4)
    stats = apply(update, it)
    shares = update.shares(6, iteration=2)
    # not equally large
    assert [len(share) for share in shares] == [2, 2, 1, 1]
    losses, log_ratios = [], []
    for weights, gradients, share in zip(recorder.weights, recorder.gradients, shares, strict=True):
        set_weights(it.model, weights)
        losses_of_share, log_ratios_of_share = expected_terms(it, objective, share)
        assert_same_gradients(gradients, gradients_of(it, losses_of_share))
        losses.append(losses_of_share.detach())
        log_ratios.append(log_ratios_of_share)
    assert log_ratios[0].abs().max() < 1e-6
    all_log_ratios = torch.cat(log_ratios)
    is_clipped = all_log_ratios.expm1().abs() > objective.clip_range
    # of the eight terms of later steps
    assert 2 <= is_clipped.sum() <= 6
    assert stats.means["clip_fraction"] == pytest.approx(is_clipped.double().mean().item())
    assert stats.means["loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5, abs=1e-6)
    assert stats.means["approx_kl"] == pytest.approx((all_log_ratios.expm1() - all_log_ratios).mean().item(), rel=1e-2)
    assert stats.deviation == 0.0


def test_without_advantages_the_gradient_is_that_of_the_divergence(tiny_weights: Path) -> None:
    it = make_iteration(tiny_weights)
    objective = ClippedSurrogate(clip_range=1e-4, kl_coef=100.0)
    recorder = Recorder(it.model)
    apply(it.update(recorder, objective=objective), it, torch.zeros(6))
    losses, _ = expected_terms(it, objective, range(6), torch.zeros(6))
    assert_same_gradients(recorder.gradients[0], gradients_of(it, losses))


def test_without_a_divergence_weight_the_reference_is_never_run(
    tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = make_iteration(tiny_weights, CPS(0.8))
    objective = ClippedSurrogate(clip_range=1e-4, kl_coef=0.0)
    expected = gradients_of(it, expected_terms(it, objective, range(6))[0])
    monkeypatch.setattr(it.model, "velocity_and_reference", None)
    recorder = Recorder(it.model)
    stats = apply(it.update(recorder, objective=objective), it)
    assert "kl" not in stats.means
    assert_same_gradients(recorder.gradients[0], expected)


@pytest.mark.parametrize("micro_batch", [1, 5])
def test_what_an_optimizer_step_sees_does_not_depend_on_the_micro_batch(micro_batch: int, tiny_weights: Path) -> None:
    it = make_iteration(tiny_weights, guidance_scale=3.0)
    results = []
    for size in (2, micro_batch):
        recorder = Recorder(it.model)
        batch_size = BatchSize(value=size, key="runtime.micro_batch")
        stats = apply(it.update(recorder, optimizer_steps=2, batch_size=batch_size), it)
        results.append((recorder.gradients, stats))
    (expected, expected_stats), (found, stats) = results
    for gradients, others in zip(found, expected, strict=True):
        assert_same_gradients(gradients, others)
    assert stats.means["loss"] == pytest.approx(expected_stats.means["loss"], abs=1e-5)
    assert stats.means["kl"] == pytest.approx(expected_stats.means["kl"], rel=1e-3)


def test_an_update_that_does_not_fit_begins_its_share_anew_with_half_the_samples(
    tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = make_iteration(tiny_weights)
    whole, halved = Recorder(it.model), Recorder(it.model)
    apply(it.update(whole), it)
    batch_size = BatchSize(value=4, key="runtime.micro_batch")
    update = it.update(halved, batch_size=batch_size)
    velocity_and_reference, calls = it.model.velocity_and_reference, []

    def in_little_memory(x_BCHW: Tensor, *arguments):
        calls.append(len(x_BCHW))
        # the third pass comes after gradients of the first batch are there
        if len(x_BCHW) == 4 and len(calls) == 3:
            raise torch.OutOfMemoryError("too many samples")
        return velocity_and_reference(x_BCHW, *arguments)

    monkeypatch.setattr(it.model, "velocity_and_reference", in_little_memory)
    stats = apply(update, it)
    assert calls == [4] * 3 + [2] * 6
    assert batch_size.value == 2
    assert_same_gradients(halved.gradients[0], whole.gradients[0])
    # rounded otherwise than the rollout, so there is nothing to tell of the ratio
    assert stats.deviation is not None
    assert math.isnan(stats.deviation)
    assert apply(update, it).deviation == 0.0


def test_each_row_of_an_update_has_the_text_and_the_advantage_of_its_own_image(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build_trainer(make_config(tiny_weights, tmp_path / "run", "train.optimizer_steps=4"))
    rolled: list[Trajectories[TrainedSteps]] = []
    rollout, update = trainer.rollout, Update.__call__

    def spy(*arguments, **settings) -> Trajectories[TrainedSteps]:
        rolled.append(rollout(*arguments, **settings))
        return rolled[-1]

    def compare(
        self, trained, conditions_B: Conditions, advantages_B: Tensor, shares, gradients, *, iteration
    ) -> UpdateStats:
        rows = [row for share in shares for row in share]
        assert rows != sorted(rows)
        prompts = trainer.prompts.at(0).texts
        texts = [prompts[row // trainer.group_size] for row in rows]
        # rewards by jpeg do not read the text
        rewards = trainer.rewards.score(rolled[0].images_BCHW, texts)
        rewards_PG = torch.empty(6).index_put((torch.tensor(rows),), rewards).view(2, 3)
        expected_PG = (rewards_PG - rewards_PG.mean(dim=1, keepdim=True)) / (rewards_PG.std(correction=0) + 1e-4)
        torch.testing.assert_close(advantages_B, expected_PG.flatten()[rows], rtol=1e-3, atol=1e-3)
        assert expected_PG.flatten().sort().values.diff().min() > 1e-2
        assert torch.equal(conditions_B.embeds_BLC, trainer.model.encode(texts).embeds_BLC)
        assert iteration == 0
        return update(self, trained, conditions_B, advantages_B, shares, gradients, iteration=iteration)

    trainer.rollout = spy  # type: ignore[assignment]
    monkeypatch.setattr(Update, "__call__", compare)
    assert trainer.step()["ratio_deviation"] == 0.0


def test_shares_are_drawn_anew_each_iteration_and_alike_in_each_run(tiny_weights: Path) -> None:
    it = make_iteration(tiny_weights)
    update = it.update(Recorder(it.model), optimizer_steps=3)
    shares = [update.shares(6, iteration) for iteration in range(20)]
    assert all(sorted(row for share in iteration for row in share) == list(range(6)) for iteration in shares)
    assert len({str(iteration) for iteration in shares}) > 10
    again = it.update(Recorder(it.model), optimizer_steps=3)
    assert [again.shares(6, i) for i in range(20)] == shares


def test_the_mean_gradient_is_clipped_to_the_norm_and_only_where_it_is_longer(tiny_weights: Path) -> None:
    it = make_iteration(tiny_weights)
    norms = []
    recorder = Recorder(it.model)
    for max_grad_norm in (1e9, 1e-4):
        norms.append(apply(it.update(recorder, max_grad_norm=max_grad_norm), it).grad_norm)
    # longer than the mean of the twelve terms, and shorter than their sum
    norms.append(apply(it.update(recorder, max_grad_norm=2 * norms[0]), it).grad_norm)
    assert norms == [norms[0]] * 3
    whole, short, again = recorder.gradients
    assert norms[0] > 1e-3
    assert_same_gradients(again, whole)
    for one, other in zip(short, whole, strict=True):
        torch.testing.assert_close(one, other * (1e-4 / norms[0]), rtol=1e-2, atol=1e-9)


def test_a_gradient_that_is_not_finite_moves_nothing_and_is_counted(tiny_weights: Path) -> None:
    it = make_iteration(tiny_weights)
    optimizer = torch.optim.AdamW(it.model.trainable.values(), lr=1e-2, fused=True)
    before = {name: weight.detach().clone() for name, weight in it.model.trainable.items()}
    advantages = ADVANTAGES.clone()
    advantages[3] = float("nan")
    stats = apply(it.update(optimizer), it, advantages)
    assert stats.skipped_steps == 1
    assert math.isnan(stats.grad_norm)
    assert all(torch.equal(weight, before[name]) for name, weight in it.model.trainable.items())
    for state in optimizer.state_dict()["state"].values():
        assert state["step"] == 0
        assert not state["exp_avg"].any()
        assert not state["exp_avg_sq"].any()
    assert all(weight.grad is None for weight in it.model.trainable.values())


def test_only_the_broken_share_is_skipped(tiny_weights: Path) -> None:
    it = make_iteration(tiny_weights)
    whole, broken = Recorder(it.model), Recorder(it.model)
    apply(it.update(whole, optimizer_steps=3), it)
    update = it.update(broken, optimizer_steps=3)
    advantages = ADVANTAGES.clone()
    advantages[update.shares(6, iteration=2)[1][0]] = float("inf")
    stats = apply(update, it, advantages)
    assert stats.skipped_steps == 1
    assert len(broken.gradients) == 2
    assert_same_gradients(broken.gradients[0], whole.gradients[0])
    assert_same_gradients(broken.gradients[1], whole.gradients[2])
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
    it = make_iteration(tiny_weights)
    with pytest.raises(ValueError, match=message):
        apply(it.update(Recorder(it.model), **settings), it)
