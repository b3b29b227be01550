"""The examples of kernels/README.md run as they stand, and its stand-in for flow_grpo's function computes the same."""

import importlib
import inspect
import math
import re
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

import fastgrpo_kernels

README = Path(__file__).parents[2] / "kernels" / "README.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", README.read_text(), flags=re.MULTILINE | re.DOTALL)
NUM_STEPS = 10


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_every_example_runs(number: int) -> None:
    exec(compile(EXAMPLES[number], f"{README.name} example {number}", "exec"), {})


def first_cells() -> dict[str, tuple[str, str]]:
    """File and signature of each name, as the tables say them."""
    found = re.findall(r"^\| \[`(\w+)`\]\(([^)]*)\)(?:<br>`(.*?)`)? \|", README.read_text(), flags=re.MULTILINE)
    return {name: (file, signature) for name, file, signature in found}


def without_types(name: str) -> str:
    signature = inspect.signature(getattr(fastgrpo_kernels, name))
    bare = [parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()]
    return f"{name}{signature.replace(parameters=bare, return_annotation=signature.empty)}"


def test_the_tables_have_every_public_name_with_its_file_and_signature() -> None:
    cells = first_cells()
    assert sorted(cells) == sorted(fastgrpo_kernels.__all__)
    # a type of words
    file, signature = cells.pop("LogProb")
    assert (file, signature) == ("fastgrpo_kernels/step_mean.py", "")
    assert "`'gaussian'`, or `'cps'`" in README.read_text()
    assert typing.get_args(fastgrpo_kernels.LogProb) == ("gaussian", "cps")
    for name, (file, signature) in cells.items():
        assert signature == without_types(name)
        assert file == f"{getattr(fastgrpo_kernels, name).__module__.replace('.', '/')}.py"


def first_table() -> list[str]:
    text = README.read_text()
    return text[text.index("| op |") : text.index("| beside them |")].strip().splitlines()[2:]


def test_the_first_table_has_every_operator_with_its_reference_and_its_gradient() -> None:
    ops = [re.findall(r"<br>`(\w+)\(", row)[0] for row in first_table()]
    # gradients are operators of their own
    names = {name for name in dir(torch.ops.fastgrpo) if not name.startswith("_") and not name.endswith("_backward")}
    assert set(ops) == names & set(fastgrpo_kernels.__all__)
    for op, row in zip(ops, first_table(), strict=True):
        module = importlib.import_module(f"fastgrpo_kernels.{Path(first_cells()[op][0]).stem}")
        assert callable(getattr(module, f"{op}_reference"))
        has_gradient = getattr(module, f"_{op}")._backward_fn is not None
        assert has_gradient == ("gradient" in row.split(" | ")[1]), op


def scheduler_of_sd3() -> FlowMatchEulerDiscreteScheduler:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(NUM_STEPS)
    return scheduler


def published_step(
    sigmas: Tensor, steps: list[int], v: Tensor, x: Tensor, noise_level: float, x_next: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Flow-GRPO's equations (arXiv:2505.05470, 8 and 9), one sample at a time, in float64."""
    log_probs, means, scales = [], [], []
    for b, step in enumerate(steps):
        t, t_next = sigmas[step].item(), sigmas[step + 1].item()
        finite = sigmas[1].item() if t == 1 else t
        scale = noise_level * math.sqrt(t / (1 - finite))
        drift = v[b].double() + scale**2 / (2 * t) * (x[b].double() + (1 - t) * v[b].double())
        mean = x[b].double() + drift * (t_next - t)
        distribution = torch.distributions.Normal(mean, scale * math.sqrt(t - t_next))
        log_probs.append(distribution.log_prob(x_next[b].double()).mean())
        means.append(mean)
        scales.append(scale)
    return torch.stack(log_probs), torch.stack(means), torch.tensor(scales, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(16, 16, 16), (64, 64)], ids=["latents", "packed tokens"])
@pytest.mark.parametrize("noise_level", [0.7, 0.3])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_flow_grpo_step_agrees_with_the_formulas_at_every_grid_point(
    shape: tuple[int, ...], noise_level: float, device: str
) -> None:
    names: dict[str, Any] = {}
    exec(EXAMPLES[-1], names)
    scheduler, steps = scheduler_of_sd3(), list(range(NUM_STEPS))
    generator = torch.Generator().manual_seed(0)
    x, v, cotangent = (torch.randn(NUM_STEPS, *shape, generator=generator) for _ in range(3))
    v_on_device = v.to(device).requires_grad_()

    def step(**given: Any) -> tuple[Tensor, ...]:
        timestep, drawn = scheduler.timesteps, torch.Generator(device).manual_seed(1)
        call = names["sde_step_with_logprob"]
        return call(scheduler, v_on_device, timestep, x.to(device), noise_level, generator=drawn, **given)

    sampled, old_log_prob, mean, scale = step()
    x_next = sampled.detach()
    again, log_prob, _, _ = step(prev_sample=x_next)
    v_double = v.double().requires_grad_()
    expected = published_step(scheduler.sigmas, steps, v_double, x, noise_level, x_next.cpu())
    assert torch.equal(again, x_next)
    assert torch.equal(log_prob, old_log_prob)
    assert scale.shape == (NUM_STEPS, *[1] * len(shape))
    torch.testing.assert_close(log_prob.cpu().double(), expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mean.cpu().double(), expected[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(scale.flatten().cpu().double(), expected[2], rtol=1e-6, atol=1e-6)
    # the noise that was added is standard normal noise of the generator that was handed in
    noise = torch.randn(v.shape, generator=torch.Generator(device).manual_seed(1), device=device).cpu()
    std_B = expected[2] * (scheduler.sigmas[:-1] - scheduler.sigmas[1:]).double().sqrt()
    column = (-1, *[1] * len(shape))
    torch.testing.assert_close(x_next.cpu().double(), expected[1] + std_B.view(column) * noise, rtol=1e-6, atol=1e-6)

    loss = log_prob.sum() + (mean * cotangent.to(device)).sum()
    (grad,) = torch.autograd.grad(loss, v_on_device)
    (expected_grad,) = torch.autograd.grad(expected[0].sum() + (expected[1] * cotangent).sum(), v_double)
    torch.testing.assert_close(grad.cpu().double(), expected_grad, rtol=1e-5, atol=1e-6)
