"""A compiled model computes what an eager one does, and is compiled in the first iteration alone."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgrpo.assembly import build_trainer
from fastgrpo.compile.blocks import CompiledBlocks, num_compilations
from fastgrpo.models.attention import attention_backend
from fastgrpo.models.lora import LoRA
from fastgrpo.models.sd3 import StableDiffusion3, joint_block
from tests.tiny_config import make_config


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # registers the variable, so that what a piece sets is undone
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", os.environ.get("TORCHINDUCTOR_CACHE_DIR", "unset"))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield
    torch._dynamo.reset()


@pytest.fixture(params=["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def compiles_without_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are traced and guarded as ever, and run by PyTorch's own kernels: seconds, not minutes.

    With ``aot_eager`` they are differentiated ahead of time as well.
    """

    def compile(function: Callable[..., Any], *, fullgraph: bool, dynamic: bool, options: Any) -> Callable[..., Any]:
        assert (fullgraph, dynamic) == (True, False)
        return original(function, fullgraph=True, dynamic=False, backend=request.param)

    original = torch.compile
    monkeypatch.setattr(torch, "compile", compile)


@pytest.mark.slow
def test_kernels_of_a_compiled_block_compute_eagers_values_and_gradients(tiny_weights: Path, tmp_path: Path) -> None:
    model = StableDiffusion3(
        weights=str(tiny_weights), adaptation=LoRA(rank=4), resolution=32, use_t5=False, max_sequence_length=7
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.trainable.values():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    # image and text tokens, and the modulations of both
    shapes = ((3, 4, 32), (3, 14, 32), (3, 6 * 32), (3, 6 * 32))
    inputs = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]

    def run(block: Callable[..., Any]) -> list[Tensor]:
        values = block(model.transformer.transformer_blocks[0], *inputs, attention_backend("sdpa"))
        weights = [weight for name, weight in model.trainable.items() if name.startswith("transformer_blocks.0.")]
        return [*values, *torch.autograd.grad(values[0].square().sum() + values[1].sum(), [*inputs, *weights])]

    expected = run(joint_block)
    assert len(expected) == 2 + 4 + 16
    compiled = CompiledBlocks(cache=str(tmp_path / "kernels"))(joint_block)
    found = run(compiled)
    for ours, eager in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, eager, rtol=0, atol=2e-5 * eager.abs().max().item())
    assert all(torch.equal(*pair) for pair in zip(run(compiled), found, strict=True))


@pytest.mark.usefixtures("compiles_without_kernels")
@pytest.mark.parametrize(
    "recipe", [pytest.param("model.guidance_scale=1.0", marks=pytest.mark.slow), "model.guidance_scale=4.5"]
)
def test_only_the_first_iteration_compiles(recipe: str, tiny_weights: Path, tmp_path: Path) -> None:
    overrides = (recipe, "algorithm.objective.kl_coef=0.04", "evaluate.every=100", "train.iterations=3")
    losses: dict[str, list[tuple[float, ...]]] = {}
    for compile in ("eager", "blocks"):
        cache = () if compile == "eager" else (f"compile.cache={tmp_path / 'kernels'}",)
        config = make_config(tiny_weights, tmp_path / compile, *overrides, f"compile={compile}", *cache)
        trainer, counts = build_trainer(config), [num_compilations()]
        losses[compile] = []
        for _ in range(3):
            metrics = trainer.step()
            assert metrics["ratio_deviation"] == 0
            losses[compile].append((metrics["loss"], metrics["grad_norm"], metrics["reward/total"]))
            counts.append(num_compilations())
        assert (counts[1] > counts[0]) == (compile == "blocks")
        assert counts[1] == counts[2] == counts[3]
    torch.testing.assert_close(torch.tensor(losses["blocks"]), torch.tensor(losses["eager"]), rtol=1e-3, atol=1e-6)
