"""What is compiled computes what eager computes, once for all blocks, and never falls back to eager by itself."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from fastgrpo.compile.blocks import MODES, CompiledBlocks, Uncompiled, _options, num_compilations
from fastgrpo_kernels import ode_step


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all tests, since a compiler's first use of a directory takes seconds."""
    return tmp_path_factory.mktemp("compiled") / "kernels"


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # registers the variable, so that what a piece sets is undone
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", os.environ.get("TORCHINDUCTOR_CACHE_DIR", "unset"))
    torch._dynamo.reset()
    # which vector instructions there are is found out by compiling with each, five seconds
    with torch._dynamo.config.patch(recompile_limit=8), torch._inductor.config.patch("cpp.vec_isa_ok", False):
        yield
    torch._dynamo.reset()


def make_blocks(count: int) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(count))


def residual(block: nn.Module, x: Tensor) -> Tensor:
    return x + torch.tanh(block(x)).square()


def make_x(batch: int) -> Tensor:
    return torch.randn(batch, 5, 8, generator=torch.Generator().manual_seed(1))


def test_equal_blocks_are_compiled_once_and_compute_what_eager_does(cache: Path) -> None:
    blocks, run = make_blocks(5), CompiledBlocks(cache=str(cache))(residual)
    x = expected = make_x(2)
    before = num_compilations()
    with torch.no_grad():
        for block in blocks:
            x, expected = run(block, x), residual(block, expected)
    assert num_compilations() == before + 1
    torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-6)


def test_gradients_are_eagers_and_a_second_pass_compiles_nothing_and_gives_the_same_bits(cache: Path) -> None:
    run = CompiledBlocks(cache=str(cache))(residual)
    gradients = {}
    for name, function in (("eager", residual), ("compiled", run), ("again", run)):
        blocks, x, before = make_blocks(4), make_x(2), num_compilations()
        for block in blocks:
            x = function(block, x)
        x.square().mean().backward()
        gradients[name] = [x.detach(), *(weight.grad for weight in blocks.parameters() if weight.grad is not None)]
        # the first block's input needs no gradient, the others' does
        assert num_compilations() - before == {"eager": 0, "compiled": 2, "again": 0}[name]
    assert len(gradients["eager"]) == 17
    torch.testing.assert_close(gradients["compiled"], gradients["eager"], rtol=1e-5, atol=1e-6)
    assert all(torch.equal(*pair) for pair in zip(gradients["again"], gradients["compiled"], strict=True))


def test_an_operator_of_ours_is_called_from_compiled_code_and_passes_its_gradient_on(cache: Path) -> None:
    def step(v: Tensor) -> Tensor:
        return ode_step(2 * x, torch.tanh(v), 0.9, -0.1).square()

    x, v = make_x(2), make_x(2).mT.contiguous().mT.requires_grad_()
    result, expected = CompiledBlocks(cache=str(cache))(step)(v), step(v)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
    grad, expected_grad = (torch.autograd.grad(value.sum(), v)[0] for value in (result, expected))
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-6)


def test_more_variants_than_the_limit_raise_each_time(cache: Path) -> None:
    block, run = make_blocks(1)[0], CompiledBlocks(cache=str(cache))(residual)
    assert torch._dynamo.config.recompile_limit == torch._dynamo.config.accumulated_recompile_limit == 128 * 8
    with torch._dynamo.config.patch(recompile_limit=2), torch.no_grad():
        for batch in (2, 3):
            run(block, make_x(batch))
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"residual was compiled 2 times: its shapes .*compile=eager"):
                run(block, make_x(4))


def test_what_cannot_be_compiled_raises(cache: Path) -> None:
    def asks_the_host(x: Tensor) -> Tensor:
        return x + 1 if x.sum().item() > 0 else x

    with pytest.raises(torch._dynamo.exc.UserError, match="data-dependent"):
        CompiledBlocks(cache=str(cache))(asks_the_host)(make_x(2))


def test_a_switched_off_compiler_raises(cache: Path) -> None:
    with torch._dynamo.config.patch(disable=True), pytest.raises(ValueError, match="TORCHDYNAMO_DISABLE"):
        CompiledBlocks(cache=str(cache))(residual)


def test_kernels_are_found_on_disk_by_who_compiles_again(tmp_path: Path) -> None:
    block, compile = make_blocks(1)[0], CompiledBlocks(cache=str(tmp_path / "kernels"))
    with torch.no_grad():
        first = compile(residual)(block, make_x(7))
    assert (tmp_path / "kernels").stat().st_mode & 0o777 == 0o700
    torch._dynamo.reset()
    counters["inductor"].clear()
    counters["aot_autograd"].clear()
    with torch.no_grad():
        assert torch.equal(compile(residual)(block, make_x(7)), first)
    assert counters["aot_autograd"]["autograd_cache_hit"] == 1
    assert counters["inductor"]["fxgraph_cache_miss"] == 0


def test_a_cache_that_others_can_enter_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with pytest.raises(ValueError, match=r"has mode 755: others have access .*compile\.cache"):
        CompiledBlocks(cache=str(tmp_path))(residual)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="one of default, max-autotune-no-cudagraphs, got 'reduce-overhead'"):
        CompiledBlocks(mode="reduce-overhead")


def test_uncompiled_is_the_function_itself() -> None:
    assert Uncompiled()(residual) is residual


def test_what_a_killed_process_left_half_linked_is_removed_once_it_is_old(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    empty, linking, whole = (cache / name for name in ("empty.so", "linking.so", "whole.so"))
    for library in (empty, linking, whole):
        library.touch()
    whole.write_bytes(b"library")
    for library in (empty, whole):
        os.utime(library, (0, 0))
    CompiledBlocks(cache=str(cache))(lambda x: x)
    assert sorted(path.name for path in cache.iterdir()) == ["linking.so", "whole.so"]


def test_a_mode_is_its_options_with_concatenations_written_in_place() -> None:
    plain, tuned = (_options(mode) for mode in MODES)
    assert not plain.get("max_autotune")
    assert tuned["max_autotune"]
    assert not tuned.get("triton.cudagraphs")
    # the second limit is younger than the first
    assert plain["max_pointwise_cat_inputs"] == plain.get("max_complex_pointwise_cat_inputs", 0) == 0
