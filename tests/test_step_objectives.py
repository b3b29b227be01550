"""Normalized ratios, divergence masks and chunks: each optimizer step follows the loss of its paper, by hand."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastgrpo.algorithm.dynamics import CPS, Dynamics, FlowSDE
from fastgrpo.algorithm.noise import STEP_STREAM
from fastgrpo.algorithm.objective.clipped_surrogate import ClippedSurrogate
from fastgrpo.algorithm.objective.flow_dppo import FlowDPPO
from fastgrpo.algorithm.objective.grpo_guard import GRPOGuard
from fastgrpo.algorithm.objective.steps import StepObjective
from fastgrpo.assembly import build_trainer
from fastgrpo.step_replay import StepReplay
from fastgrpo_kernels import philox_normal
from tests.test_update import (
    ADVANTAGES,
    GRID,
    GROUP_SIZE,
    PROMPTS,
    STEPS,
    Iteration,
    Recorder,
    apply,
    assert_same_gradients,
    gradients_of,
    make_iteration,
    mean_and_scale,
    set_weights,
    velocity,
)
from tests.tiny_config import make_config


def mean_of(it: Iteration, place: int, b: int) -> tuple[Tensor, float]:
    """Of diffusers' own forward pass under the weights as they are, and the step's std."""
    x, step = it.trajectories.trained.x_TBCHW[place, b], STEPS[place]
    v = velocity(it, it.model.transformer, x, GRID[step], it.conditions_B[b : b + 1])
    mean, std, _ = mean_and_scale(it.dynamics, step, x, v)
    return mean, std


def noise(place: int, b: int) -> Tensor:
    """What the rollout added, drawn again by its ids."""
    ids = torch.tensor([PROMPTS.ids[b // GROUP_SIZE]]), torch.tensor([b % GROUP_SIZE])
    return philox_normal(3, STEP_STREAM + STEPS[place], *ids, 256)[0, 0].view(16, 4, 4)


def log_prob(it: Iteration, mean: Tensor, std: float, place: int, b: int) -> Tensor:
    x_next = it.trajectories.trained.x_next_TBCHW[place, b]
    if isinstance(it.dynamics, CPS):
        return -(x_next - mean).square().mean()
    return torch.distributions.Normal(mean, std).log_prob(x_next).mean()


def clipped(ratio: Tensor, advantage: float, clip_range: float) -> Tensor:
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_range, 1 + clip_range))


def losses(it: Iteration, objective: StepObjective, old: dict[tuple[int, int], Tensor]) -> tuple[Tensor, list[bool]]:
    """Of each term of each sample, ``old`` means given; and which of them have no gradient."""
    found, is_off = [], []
    for b in range(6):
        advantage, log_ratios = ADVANTAGES[b].item(), []
        for place, step in enumerate(STEPS):
            mean, std = mean_of(it, place, b)
            moved = mean - old[place, b]
            log_ratio = log_prob(it, mean, std, place, b) - log_prob(it, old[place, b], std, place, b)
            log_ratios.append(log_ratio)
            if isinstance(objective, GRPOGuard):
                ratio = (moved * noise(place, b)).mean().exp()
                found.append(clipped(ratio, advantage, objective.clip_range) / (GRID[step] - GRID[step + 1]))
                is_off.append(abs(ratio.item() - 1) > objective.clip_range)
            if isinstance(objective, FlowDPPO):
                is_far = moved.square().mean().item() / (2 * std**2) > objective.max_divergence
                is_off.append(is_far and advantage * log_ratio.item() > 0)
                found.append(-advantage * log_ratio.exp() * (not is_off[-1]))
        if isinstance(objective, ClippedSurrogate):
            ratio = torch.stack(log_ratios).mean().exp()
            found.append(clipped(ratio, advantage, objective.clip_range))
            is_off.append(abs(ratio.item() - 1) > objective.clip_range)
    return torch.stack(found), is_off


@pytest.mark.parametrize(
    ("objective", "dynamics", "rate"),
    [
        (GRPOGuard(clip_range=5e-5), FlowSDE(0.7), 2e-3),
        (GRPOGuard(clip_range=5e-5), CPS(0.8), 2e-3),
        (FlowDPPO(max_divergence=3e-5), FlowSDE(0.7), 2e-2),
        (FlowDPPO(max_divergence=3e-5), CPS(0.8), 2e-2),
        (ClippedSurrogate(1e-3, 0.0, (2,)), FlowSDE(0.7), 2e-2),
    ],
    ids=lambda value: "" if isinstance(value, float) else type(value).__name__,
)
def test_each_optimizer_step_follows_the_published_loss(
    objective: StepObjective, dynamics: Dynamics, rate: float, tiny_weights: Path
) -> None:
    it = make_iteration(tiny_weights, dynamics, keeps_means=objective.needs_distance)
    with torch.no_grad():
        old = {(place, b): mean_of(it, place, b)[0] for place in range(2) for b in range(6)}
    recorder = Recorder(it.model, lr=rate)
    stats = apply(it.update(recorder, objective=objective, updates=3), it)
    assert len(recorder.gradients) == 3
    means, off = [], []
    for weights, gradients in zip(recorder.weights, recorder.gradients, strict=True):
        set_weights(it.model, weights)
        expected, is_off = losses(it, objective, old)
        assert_same_gradients(gradients, gradients_of(it, expected))
        means.append(expected.mean().item())
        off += is_off
    assert stats.means["loss"] == pytest.approx(sum(means) / 3, rel=1e-4, abs=1e-5)
    assert stats.means["clip_fraction"] == pytest.approx(sum(off) / len(off))
    # some and not all
    assert 0 < sum(off) < len(off)
    assert stats.deviation is not None
    assert stats.deviation <= stats.max_deviation
    assert stats.num_terms == (1 if isinstance(objective, ClippedSurrogate) else 2)


def test_means_are_kept_where_they_are_asked_for_alone(tiny_weights: Path) -> None:
    with_means, without = (make_iteration(tiny_weights, keeps_means=keeps) for keeps in (True, False))
    assert without.trajectories.trained.mean_TBCHW.shape == (0, 6, 16, 4, 4)
    trained = with_means.trajectories.trained
    std = torch.tensor([mean_of(with_means, place, 0)[1] for place in range(2)])
    z = torch.stack([torch.stack([noise(place, b) for b in range(6)]) for place in range(2)])
    expected = trained.x_next_TBCHW - std[:, None, None, None, None] * z
    torch.testing.assert_close(trained.mean_TBCHW, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("recipe", "terms"), [("flow_grpo_guard", 3), ("flow_dppo", 3), ("chunk_grpo", 2), ("flow_grpo", 3)]
)
def test_a_recipe_trains_and_its_ratio_begins_at_one(
    recipe: str, terms: int, tiny_weights: Path, tmp_path: Path
) -> None:
    trainer = build_trainer(make_config(tiny_weights, tmp_path / "run", f"algorithm={recipe}", "train.updates=2"))
    replay = trainer.update.replay
    metrics = [trainer.step() for _ in range(2)]
    for row in metrics:
        assert row["ratio_deviation"] == 0.0
        assert math.isfinite(row["loss"])
        assert row["grad_norm"] > 0
        assert row["optimizer_steps"] == 2
    assert isinstance(replay, StepReplay)
    assert len(replay.objective.chunks(3)) == terms


@pytest.mark.parametrize("recipe", ["flow_grpo_guard", "flow_dppo", "chunk_grpo"])
def test_what_is_not_of_one_steps_log_prob_cannot_be_reweighted(
    recipe: str, tiny_weights: Path, tmp_path: Path
) -> None:
    config = make_config(tiny_weights, tmp_path / "run", f"algorithm={recipe}", "train.gradients=reweight")
    with pytest.raises(ValueError, match=r"^train\.gradients=reweight takes .* use train\.gradients=replay"):
        build_trainer(config)


def test_the_planner_is_shown_the_longest_chunk(tiny_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    it = make_iteration(tiny_weights)
    seen: list[float] = []
    run = type(it.model).velocity

    def counting(self, x, t, *arguments):
        seen.append(t)
        return run(self, x, t, *arguments)

    monkeypatch.setattr(type(it.model), "velocity", counting)
    # of five steps a chunk of two, and one of three
    replay = StepReplay(model=it.model, grid=GRID, dynamics=it.dynamics, objective=ClippedSurrogate(1e-4, 0.0, (2, 3)))
    replay.rehearse(torch.zeros(2, 16, 4, 4), it.conditions_B[:2])
    assert seen == list(GRID[2:5])
    for weight in it.model.trainable.values():
        weight.grad = None
