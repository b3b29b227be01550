"""fp8 layers against their formula in float64, against torch's own product, and in a model against its exact self."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastgrpo.compile.blocks import Uncompiled
from fastgrpo.models import fp8
from fastgrpo.models.adaptation import FullFineTuning
from fastgrpo.models.blocks.heads import added_stack, self_stack
from fastgrpo.models.fp8 import Fp8, block_layers, fp8_linear, fp8_product_reference, quantize_rows
from fastgrpo.models.lora import LoRA
from fastgrpo.models.low_rank import projected
from fastgrpo.models.sd3 import StableDiffusion3
from fastgrpo_kernels import combined

TEXTS = ["a red circle", "two blue squares"]
T = 0.8
GUIDANCE = 2.0


def make_model(weights: Path, adaptation=None, **settings) -> StableDiffusion3:
    """A model that has moved from its start, so that its adapters are not zero."""
    model = StableDiffusion3(
        weights=str(weights),
        adaptation=adaptation or LoRA(rank=4),
        resolution=64,
        guidance_scale=GUIDANCE,
        max_sequence_length=0,
        use_t5=False,
        **{"lossy": Fp8()} | settings,
    )
    move(model, seed=1)
    return model


@torch.no_grad()
def move(model: StableDiffusion3, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in model.trainable.values():
        weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.1 if model.has_lora else 0.01)


def latents() -> Tensor:
    return torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(3))


def velocity(model: StableDiffusion3, *, lossy: bool) -> Tensor:
    with model.sampling(lossy=lossy):
        return combined(model.velocity(latents(), T, model.encode(TEXTS)))


def operands(rows: int = 33, width: int = 64, outputs: int = 48) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x_MI = torch.randn(rows, width, generator=generator) * torch.logspace(-3, 3, rows)[:, None]
    weight_OI = torch.randn(outputs, width, generator=generator) * torch.logspace(-2, 0, outputs)[:, None]
    return x_MI, weight_OI, torch.randn(outputs, generator=generator)


def test_fp8_that_is_not_compiled_is_refused_on_a_gpu_before_anything_is_loaded() -> None:
    nowhere = Path("nowhere")
    with pytest.raises(ValueError, match=r"lossy=fp8 is slower than bfloat16 .*; use compile=blocks, or lossy=none"):
        make_model(nowhere, device="cuda", compile=Uncompiled())
    # a CPU measures what it changes, and loads
    with pytest.raises(ValueError, match="nowhere"):
        make_model(nowhere, device="cpu", compile=Uncompiled())


def test_a_row_is_scaled_to_448_and_rounded_to_three_bits() -> None:
    # by hand: 0.3 = 1.2 / 4 lies between 1.125 / 4 and 1.25 / 4; 17 between 16 and 18, a tie, goes to the even 16
    a8_RI, scale_R = quantize_rows(torch.tensor([[-448.0, 0.3, 17.0], [2.0, 4.0, -1.0], [0.0, 0.0, 0.0]]))
    assert a8_RI[0].float().tolist() == [-448.0, 0.3125, 16.0]
    assert a8_RI[1].float().tolist() == [224.0, 448.0, -112.0]
    assert a8_RI[2].float().tolist() == [0.0, 0.0, 0.0]
    assert scale_R.tolist() == pytest.approx([1.0, 4 / 448, 1.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_largest_of_a_row_never_overflows(dtype: torch.dtype) -> None:
    a_RI = torch.randn(4096, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    a8_RI, _ = quantize_rows(a_RI)
    assert (a8_RI.float().abs().amax(dim=1) == 448).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(bad: float) -> None:
    a_RI = torch.ones(2, 16)
    a_RI[1, 3] = bad
    y_RO = fp8_linear(a_RI, *quantize_rows(torch.ones(16, 16)), None)
    assert (y_RO[0] == 16).all()
    assert y_RO[1].isnan().all()


@pytest.mark.parametrize("has_bias", [True, False])
def test_the_product_is_its_formula_in_float64_rounded_to_bfloat16(has_bias: bool) -> None:
    x_MI, weight_OI, bias_O = operands()
    (x8, s_M), (w8, s_O) = quantize_rows(x_MI), quantize_rows(weight_OI)
    expected = torch.einsum("mi,oi->mo", x8.double() * s_M.double()[:, None], w8.double() * s_O.double()[:, None])
    bias = bias_O.bfloat16() if has_bias else None
    expected = expected + bias.double() if bias is not None else expected
    found = fp8_product_reference(x8, s_M, w8, s_O, bias)
    assert found.dtype == torch.bfloat16
    # half a unit in the last place of bfloat16, and what a float32 sum of 64 products may lose
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-5 * expected.abs().max().item())


def test_the_product_is_torchs_own() -> None:
    x_MI, weight_OI, bias_O = operands()
    (x8, s_M), (w8, s_O), bias = quantize_rows(x_MI), quantize_rows(weight_OI), bias_O.bfloat16()
    try:
        theirs = torch._scaled_mm(x8, w8.t(), s_M[:, None], s_O[None], bias, out_dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"this torch multiplies no fp8 by row on the CPU: {error}")
    ours = fp8_product_reference(x8, s_M, w8, s_O, bias)
    torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 33, 1024])
def test_the_kernel_is_the_reference(rows: int) -> None:
    x_MI, weight_OI, bias_O = operands(rows, width=1536, outputs=96)
    weights = (*quantize_rows(weight_OI), bias_O.bfloat16())
    expected = fp8_linear(x_MI.bfloat16(), *weights)
    found = fp8_linear(x_MI.bfloat16().cuda(), *(part.cuda() for part in weights)).cpu()
    # fast accumulation keeps about 14 bits of a sum
    torch.testing.assert_close(found, expected, rtol=2**-6, atol=2**-10 * expected.abs().max().item())


def test_a_layer_loses_no_more_than_three_bits_of_each_factor_do() -> None:
    x_MI, weight_OI, _ = operands(rows=256, width=512, outputs=512)
    exact = x_MI @ weight_OI.t()
    lossy = fp8_linear(x_MI, *quantize_rows(weight_OI), None)
    error_M = (lossy - exact).norm(dim=1) / exact.norm(dim=1)
    # a factor's error is uniform within half of 1/8 to 1/16 of it: .026 in the mean square, twice
    assert 0.02 < error_M.mean() < 0.05
    assert error_M.max() < 0.06


def test_the_linear_layers_of_blocks_run_in_fp8_and_no_others(tiny_weights: Path) -> None:
    transformer = make_model(tiny_weights).transformer
    modules = {id(module): name for name, module in transformer.named_modules()}
    found = {f"{modules[id(parent)]}.{name}" for parent, name, _ in block_layers(transformer)}
    image, text = ("to_q", "to_k", "to_v", "to_out.0"), ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    first = {f"attn.{name}" for name in (*image, *text)} | {
        f"{ff}.{name}" for ff in ("ff", "ff_context") for name in ("net.0.proj", "net.2")
    }
    # the text ends in the last block: nothing is computed of it but keys and values, and queries
    last = {f"attn.{name}" for name in (*image, *text[:3])} | {"ff.net.0.proj", "ff.net.2"}
    assert found == {f"transformer_blocks.0.{n}" for n in first} | {f"transformer_blocks.1.{n}" for n in last}


def test_lossy_velocities_are_near_and_exact_ones_come_back_bit_for_bit(tiny_weights: Path) -> None:
    model = make_model(tiny_weights)
    exact = velocity(model, lossy=False)
    names = [name for name, _ in model.transformer.named_modules()]
    error = (velocity(model, lossy=True) - exact).norm() / exact.norm()
    # blocks of width 32 with random weights lose more than a trained model, of which benchmarks/lossy.py reports
    assert 1e-2 < error < 0.2
    assert torch.equal(velocity(model, lossy=False), exact)
    assert [name for name, _ in model.transformer.named_modules()] == names


def test_an_error_inside_leaves_the_exact_layers_behind(tiny_weights: Path) -> None:
    model = make_model(tiny_weights)
    exact = velocity(model, lossy=False)
    with pytest.raises(KeyError), model.sampling(lossy=True):
        raise KeyError
    assert torch.equal(velocity(model, lossy=False), exact)


def test_sampling_inside_an_exact_one_is_exact(tiny_weights: Path) -> None:
    model = make_model(tiny_weights)
    exact = velocity(model, lossy=False)
    with model.sampling():
        assert torch.equal(velocity(model, lossy=True), exact)


def test_adapters_are_quantized_with_the_weights_they_are_merged_into(tiny_weights: Path) -> None:
    model, merged = make_model(tiny_weights), make_model(tiny_weights)
    merged.adaptation.merge_for_good()
    kept = Fp8()(merged.transformer)
    with torch.no_grad(), kept():
        conditions = merged.encode([*TEXTS, "", ""])
        v = merged._network(merged.transformer, latents().repeat(2, 1, 1, 1), T, conditions)
    expected = v[2:] + GUIDANCE * (v[:2] - v[2:])
    torch.testing.assert_close(velocity(model, lossy=True), expected, rtol=1e-5, atol=1e-5)
    # the adapters matter: without them the velocity is another one by more than fp8 loses
    frozen = velocity(make_model(tiny_weights, LoRA(rank=4, alpha=1e-6)), lossy=True)
    assert (frozen - expected).norm() > 0.1 * expected.norm()


@pytest.mark.parametrize("adaptation", [LoRA(rank=4), FullFineTuning()], ids=lambda piece: type(piece).__name__)
def test_layers_are_quantized_anew_when_the_policy_has_moved(adaptation, tiny_weights: Path) -> None:
    model = make_model(tiny_weights, adaptation)
    before = velocity(model, lossy=True)
    move(model, seed=2)
    after = velocity(model, lossy=True)
    fresh = make_model(tiny_weights, adaptation)
    move(fresh, seed=2)
    assert torch.equal(after, velocity(fresh, lossy=True))
    assert not torch.allclose(after, before, rtol=1e-2, atol=1e-2)


def test_a_compiled_block_has_one_graph_for_all_fp8_layers_and_its_exact_one_back(tiny_weights: Path) -> None:
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    class Compiled(Uncompiled):
        def __call__(self, function):
            return torch.compile(function, backend=backend, fullgraph=True)

    torch._dynamo.reset()
    model = make_model(tiny_weights, compile=Compiled())
    plain = make_model(tiny_weights)
    for _ in range(2):
        counts = []
        for lossy in (False, True, False):
            torch.testing.assert_close(velocity(model, lossy=lossy), velocity(plain, lossy=lossy), rtol=1e-4, atol=1e-4)
            counts.append(len(graphs))
    # two kinds of blocks, the middle and the last one, each exact and lossy, and nothing new the second time
    assert counts == [4, 4, 4]
    torch._dynamo.reset()


def test_a_transformer_without_layers_that_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lossy=fp8 found no linear layer.*use lossy=none"):
        Fp8()(nn.Sequential(nn.Linear(16, 16)))


def test_what_is_one_product_in_full_precision_is_one_in_fp8_and_rounds_its_input_once(
    tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(tiny_weights)
    rounded = []

    def quantize(a_RI: Tensor) -> tuple[Tensor, Tensor]:
        rounded.append(a_RI.shape)
        return quantize_rows(a_RI)

    with model.sampling(lossy=True):
        attn = model.transformer.transformer_blocks[0].attn
        groups: list[Any] = [self_stack(attn), added_stack(attn)]
        for layers in groups:
            x = torch.randn(2, 5, layers[0].weight_OI.shape[1], generator=torch.Generator().manual_seed(4))
            alone = [layer(x) for layer in layers]
            with monkeypatch.context() as patched:
                patched.setattr(fp8, "quantize_rows", quantize)
                together = projected(layers, x)
            assert len({one.std().item() for one in alone}) == 3
            assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))
    assert len(rounded) == 2
