"""A group that starts from one noise is one sample until its first stochastic step: the same trajectories for less."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastgrpo.algorithm.dynamics import CPS
from fastgrpo.algorithm.schedule import SD3Schedule
from fastgrpo.algorithm.solver import AdamsBashforth, CachedGuidance, Euler, Solver
from fastgrpo.memory.batches import BatchSizes
from fastgrpo.models.lora import LoRA
from fastgrpo.models.pipeline_model import PipelineModel
from fastgrpo.models.sd3 import StableDiffusion3
from fastgrpo.rollout import StepRollout
from fastgrpo.sampler import Sampler
from fastgrpo.types import Noise, Prompts, Samples, TrainedSteps, Trajectories

GRID = SD3Schedule(6)()
PROMPTS = Prompts(["a red circle", "two blue squares"], ids=[4, 9])
GROUP_SIZE = 3
GUIDANCE = 2.0
WINDOW = (3, 4)


@pytest.fixture(scope="module")
def model(tiny_weights: Path) -> StableDiffusion3:
    model = StableDiffusion3(
        weights=str(tiny_weights),
        adaptation=LoRA(rank=4),
        resolution=64,
        guidance_scale=GUIDANCE,
        max_sequence_length=0,
        use_t5=False,
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.trainable.values():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.05)
    return model


def starts() -> Tensor:
    """One noise a prompt, for all of its group."""
    noise = torch.randn(len(PROMPTS), 16, 8, 8, generator=torch.Generator().manual_seed(2))
    return noise.repeat_interleave(GROUP_SIZE, dim=0)


def roll(
    model: StableDiffusion3, *, is_shared: bool, steps: tuple[int, ...] = WINDOW, solver: Solver | None = None
) -> tuple[Trajectories[TrainedSteps], list[tuple[float, int]]]:
    """Trajectories, and (t, rows) of each pass through the network."""
    passes: list[tuple[float, int]] = []
    run = PipelineModel._run

    def counting(self, transformer, t, x_BCHW, conditions):
        passes.append((t, len(x_BCHW)))
        return run(self, transformer, t, x_BCHW, conditions)

    sampler = Sampler(model=model, grid=GRID, batch_sizes=BatchSizes.of(3, 6, 3), solver=solver or Euler())
    rollout = StepRollout(sampler=sampler, dynamics=CPS(0.8), timesteps=lambda *_: steps, seed=11)
    noise = Noise(starts(), metrics={}, num_scored=0, is_shared=is_shared)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PipelineModel, "_run", counting)
        samples = Samples.all_of(PROMPTS, GROUP_SIZE)
        return rollout(samples, model.encode(samples.texts), noise, 0), passes


def rows_at(passes: list[tuple[float, int]], step: int) -> int:
    return sum(rows for t, rows in passes if t == GRID[step])


@pytest.mark.parametrize("solver", [Euler(), AdamsBashforth(), CachedGuidance()], ids=lambda s: type(s).__name__)
def test_a_shared_prefix_gives_the_trajectories_of_separate_ones(solver: Solver, model: StableDiffusion3) -> None:
    (shared, _), (separate, _) = (roll(model, is_shared=is_shared, solver=solver) for is_shared in (True, False))
    assert shared.trained.steps == separate.trained.steps == WINDOW
    for ours, theirs in zip(shared.trained.tensors, separate.trained.tensors, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shared.images_BCHW, separate.images_BCHW, rtol=0, atol=1e-4)
    assert torch.equal(shared.start_BCHW, separate.start_BCHW)


def test_samples_of_a_group_are_one_until_the_first_stochastic_step_and_part_there(model: StableDiffusion3) -> None:
    trained = roll(model, is_shared=True)[0].trained
    x_PGX = trained.x_TBCHW[0].unflatten(0, (2, GROUP_SIZE)).flatten(2)
    assert (x_PGX == x_PGX[:, :1]).all()
    assert not torch.allclose(x_PGX[0], x_PGX[1], atol=0.1)
    x_next_GX = trained.x_next_TBCHW[0].unflatten(0, (2, GROUP_SIZE))[0].flatten(1)
    assert torch.pdist(x_next_GX).min() > 1


def test_the_prefix_runs_once_a_prompt(model: StableDiffusion3) -> None:
    (_, shared), (_, separate) = (roll(model, is_shared=is_shared) for is_shared in (True, False))
    # both branches of guidance of two prompts, in place of six samples
    assert [rows_at(shared, step) for step in range(6)] == [4, 4, 4, 12, 12, 12]
    assert [rows_at(separate, step) for step in range(6)] == [12] * 6


def test_nothing_is_shared_from_a_stochastic_first_step_on(model: StableDiffusion3) -> None:
    _, passes = roll(model, is_shared=True, steps=(0, 2))
    assert [rows_at(passes, step) for step in range(6)] == [12] * 6
