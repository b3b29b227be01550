"""Trajectories follow the formulas of the dynamics, whatever the micro-batch and the company of a prompt."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastgrpo.algorithm.dynamics import CPS, DanceSDE, Dynamics, FlowSDE
from fastgrpo.algorithm.noise import STEP_STREAM
from fastgrpo.algorithm.schedule import SD3Schedule
from fastgrpo.memory.batches import BatchSizes
from fastgrpo.models.lora import LoRA
from fastgrpo.models.sd3 import StableDiffusion3
from fastgrpo.rollout import StepRollout
from fastgrpo.sampler import Sampler
from fastgrpo.types import Noise, Prompts, Samples, TrainedSteps, Trajectories
from fastgrpo_kernels import combined, philox_normal

SEED = 11
GRID = SD3Schedule(5)()
STEPS = (0, 2, 3)
PROMPTS = Prompts(["a red circle", "two blue squares"], ids=[4, 9])
GROUP_SIZE = 3


@pytest.fixture(scope="module")
def model(tiny_weights: Path) -> StableDiffusion3:
    return StableDiffusion3(
        weights=str(tiny_weights),
        adaptation=LoRA(rank=4),
        resolution=64,
        guidance_scale=2.0,
        max_sequence_length=0,
        use_t5=False,
    )


def make_start(num_samples: int) -> Tensor:
    return torch.randn(num_samples, 16, 8, 8, generator=torch.Generator().manual_seed(2))


def roll(
    model: StableDiffusion3, *, prompts: Prompts = PROMPTS, micro_batch: int = 4, dynamics: Dynamics | None = None,
    start: Tensor | None = None,
) -> Trajectories[TrainedSteps]:  # fmt: skip
    dynamics = dynamics or FlowSDE(0.7)
    start = make_start(len(prompts) * GROUP_SIZE) if start is None else start
    samples = Samples.all_of(prompts, GROUP_SIZE)
    rollout = make_rollout(model, dynamics, STEPS, micro_batch)
    return rollout(samples, model.encode(samples.texts), Noise(start, metrics={}, num_scored=0), 0)


def make_rollout(
    model: StableDiffusion3, dynamics: Dynamics, steps: tuple[int, ...], micro_batch: int = 4
) -> StepRollout:
    sampler = Sampler(model=model, grid=GRID, batch_sizes=BatchSizes.of(micro_batch))
    return StepRollout(sampler=sampler, dynamics=dynamics, timesteps=lambda *_: steps, seed=SEED)


def mean_and_std(dynamics: Dynamics, step: int, x: Tensor, v: Tensor) -> tuple[Tensor, float]:
    """The published formulas, written out in another way than the coefficients of ``algorithm/dynamics.py``."""
    t, t_next = GRID[step], GRID[step + 1]
    dt = t_next - t
    if isinstance(dynamics, CPS):
        std = t_next * math.sin(dynamics.noise_level * math.pi / 2)
        image, noise = x - t * v, x + (1 - t) * v
        return (1 - t_next) * image + math.sqrt(t_next**2 - std**2) * noise, std
    s = 0.3 if isinstance(dynamics, DanceSDE) else 0.7 * math.sqrt(t / (1 - (GRID[1] if t == 1 else t)))
    drift = v + s**2 / (2 * t) * (x + (1 - t) * v)
    return x + drift * dt, s * math.sqrt(-dt)


@pytest.mark.parametrize("dynamics", [FlowSDE(0.7), DanceSDE(0.3), CPS(0.8)], ids=lambda d: type(d).__name__)
@torch.no_grad()
def test_every_stored_value_follows_the_formulas(dynamics: Dynamics, model: StableDiffusion3) -> None:
    trajectories = roll(model, dynamics=dynamics)
    conditions = model.encode([PROMPTS.texts[0]] * 3 + [PROMPTS.texts[1]] * 3)
    x = make_start(6)
    for step in range(5):
        v = combined(model.velocity(x, GRID[step], conditions))
        if step not in STEPS:
            x = x + (GRID[step + 1] - GRID[step]) * v
            continue
        place = STEPS.index(step)
        mean, std = mean_and_std(dynamics, step, x.double(), v.double())
        noise = philox_normal(SEED, STEP_STREAM + step, torch.tensor([4, 9]), torch.arange(3), 1024).view(6, 16, 8, 8)
        x_next = mean + std * noise
        if isinstance(dynamics, CPS):
            log_prob = -(x_next - mean).square().mean(dim=(1, 2, 3))
        else:
            log_prob = torch.distributions.Normal(mean, std).log_prob(x_next).mean(dim=(1, 2, 3))
        torch.testing.assert_close(trajectories.trained.x_TBCHW[place], x, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(trajectories.trained.x_next_TBCHW[place], x_next.float(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(trajectories.trained.log_prob_TB[place], log_prob.float(), atol=1e-5, rtol=1e-5)
        x = x_next.float()
    torch.testing.assert_close(trajectories.images_BCHW, model.decode(x), atol=1e-4, rtol=0)
    assert torch.equal(trajectories.start_BCHW, make_start(6))
    assert trajectories.trained.steps == STEPS


@pytest.mark.parametrize("micro_batch", [1, 4, 5])
def test_the_micro_batch_changes_no_trajectory(micro_batch: int, model: StableDiffusion3) -> None:
    whole, parts = roll(model, micro_batch=6), roll(model, micro_batch=micro_batch)
    torch.testing.assert_close(parts.images_BCHW, whole.images_BCHW, atol=1e-5, rtol=1e-5)
    for part, of_whole in zip(parts.trained.tensors, whole.trained.tensors, strict=True):
        torch.testing.assert_close(part, of_whole, atol=1e-5, rtol=1e-5)


def test_a_window_that_does_not_fit_is_begun_anew_so_that_all_its_batches_are_of_one_size(
    model: StableDiffusion3, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = roll(model, micro_batch=2).trained
    velocity, calls = model.velocity, []

    def in_little_memory(x_BCHW: Tensor, *arguments):
        calls.append(len(x_BCHW))
        # the second batch of the window, whose first has run its four steps
        if len(calls) == 5:
            raise torch.OutOfMemoryError("too many samples")
        return velocity(x_BCHW, *arguments)

    monkeypatch.setattr(model, "velocity", in_little_memory)
    found = roll(model, micro_batch=4).trained
    # what is left of the first try, the window, and the last step, in batches of a size of its own
    assert calls == [4] * 5 + [2] * 4 + [2] * 12 + [4] * 2
    for one, other in zip(found.tensors, expected.tensors, strict=True):
        assert torch.equal(one, other)


def test_a_prompt_has_its_noise_whatever_its_company(model: StableDiffusion3) -> None:
    together = roll(model, micro_batch=3)
    start = make_start(6)[3:]
    alone = roll(model, prompts=Prompts([PROMPTS.texts[1]], ids=[9]), micro_batch=3, start=start)
    elsewhere = roll(model, prompts=Prompts([PROMPTS.texts[1]], ids=[8]), micro_batch=3, start=start)
    assert torch.equal(alone.trained.x_next_TBCHW, together.trained.x_next_TBCHW[:, 3:])
    assert torch.equal(alone.trained.x_TBCHW[0], elsewhere.trained.x_TBCHW[0])
    assert not torch.equal(alone.trained.x_next_TBCHW, elsewhere.trained.x_next_TBCHW)


def test_samples_of_one_start_and_text_part_at_the_first_step(model: StableDiffusion3) -> None:
    start = make_start(1).expand(6, -1, -1, -1)
    trajectories = roll(model, prompts=Prompts(["a red circle"] * 2, ids=[0, 1]), start=start)
    distances = torch.cdist(
        trajectories.trained.x_next_TBCHW[0].flatten(1), trajectories.trained.x_next_TBCHW[0].flatten(1)
    )
    # two independent draws of 1024 elements are sqrt(2 * 1024) * std apart
    _, std = mean_and_std(FlowSDE(0.7), 0, start, start)
    expected = math.sqrt(2 * 1024) * std
    torch.testing.assert_close(
        distances[~torch.eye(6, dtype=torch.bool)], torch.full((30,), expected), rtol=0.15, atol=0
    )


def test_no_trained_step_stores_no_state(model: StableDiffusion3) -> None:
    rollout = make_rollout(model, FlowSDE(), ())
    samples, noise = Samples.all_of(PROMPTS, GROUP_SIZE), Noise(make_start(6), metrics={}, num_scored=0)
    trajectories = rollout(samples, model.encode(samples.texts), noise, 0)
    assert trajectories.trained.x_TBCHW.shape == (0, 6, 16, 8, 8)
    assert trajectories.trained.log_prob_TB.shape == (0, 6)
    again = rollout(samples, model.encode(samples.texts), noise, 0)
    assert torch.equal(trajectories.images_BCHW, again.images_BCHW)
    # and all of it is what sampling does
    sampled = rollout.sampler(samples, model.encode(samples.texts), make_start(6))
    assert torch.equal(trajectories.images_BCHW, sampled)
