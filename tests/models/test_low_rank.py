"""Stacked layers and adapters as columns: the sums that they stand for, their gradients, and copies that follow."""

import copy
import gc
import weakref
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgrpo.models.adaptation import FullFineTuning
from fastgrpo.models.lora import LoRA, LoRAAdaptation
from fastgrpo.models.low_rank import LoRALinear, projected

WIDTH, SCALE = 12, 3.0
NAMES = ("to_q", "to_k", "to_v")


def make_block(dtype: torch.dtype = torch.float64, widths: Sequence[int] = (8, 8, 8)) -> nn.Module:
    torch.manual_seed(0)
    layers = {name: nn.Linear(WIDTH, width) for name, width in zip(NAMES, widths, strict=True)}
    return nn.ModuleDict({"attn": nn.ModuleDict(layers)}).to(dtype)


def stack_of(block: nn.Module) -> list[nn.Module]:
    return [block.get_submodule(f"attn.{name}") for name in NAMES]


def adapt(block: nn.Module, targets: tuple[str, ...] = NAMES) -> LoRAAdaptation:
    """Stacked adapters that are not zero."""
    adaptation = LoRA(rank=2, alpha=2 * SCALE, targets=targets)(block)
    adaptation.stack([stack_of(block)])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in adaptation.trainable.values():
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
    return adaptation


def inputs(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(2), dtype=dtype)


def storage_of(layer: nn.Module) -> int:
    return layer.get_parameter("weight").untyped_storage().data_ptr()


def by_definition(block: nn.Module, x: Tensor, gain: float = 1.0) -> Tensor:
    """y = W x + b + s B A x, part after part."""
    parts = []
    for layer in stack_of(block):
        assert isinstance(layer, LoRALinear)
        low = F.linear(F.linear(x, layer.lora_A), layer.lora_B)
        parts.append(F.linear(x, layer.base.weight, layer.base.bias) + gain * SCALE * low)
    return torch.cat(parts, dim=-1)


def together(block: nn.Module, x: Tensor) -> Tensor:
    return torch.cat(projected(stack_of(block), x), dim=-1)


@pytest.mark.parametrize("widths", [(8, 8, 8), (8, 4, 6)], ids=["alike", "unlike"])
def test_one_product_is_the_sum_that_it_stands_for_and_so_is_its_gradient(widths: Sequence[int]) -> None:
    block = make_block(widths=widths)
    weights = list(adapt(block).trainable.values())
    x = inputs().requires_grad_()
    cotangent = torch.randn(3, 5, sum(widths), generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    ours, theirs = together(block, x), by_definition(block, x)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    found = torch.autograd.grad(ours, [x, *weights], cotangent)
    expected = torch.autograd.grad(theirs, [x, *weights], cotangent)
    for one, other in zip(found, expected, strict=True):
        assert other.any()
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


def test_a_part_of_a_longer_sequence_has_the_gradient_of_a_copy() -> None:
    block = make_block()
    weights = list(adapt(block).trainable.values())
    longer = torch.cat([inputs(), inputs()], dim=1)
    found = torch.autograd.grad(together(block, longer[:, :5]).square().sum(), weights)
    expected = torch.autograd.grad(by_definition(block, inputs()).square().sum(), weights)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_without_gradient_it_is_the_same_bit_for_bit() -> None:
    block = make_block(torch.float32)
    adapt(block)
    x = inputs(torch.float32)
    with torch.no_grad():
        plain = together(block, x)
    assert torch.equal(together(block, x), plain)


def test_each_sample_has_a_gradient_of_its_own_inside_by_sample() -> None:
    block = make_block()
    adaptation = adapt(block)
    x = inputs()
    with adaptation.by_sample(3) as copies:
        found = torch.autograd.grad(together(block, x).square().sum(), copies)
    for b in range(3):
        alone = torch.autograd.grad(
            by_definition(block, x[b : b + 1]).square().sum(), list(adaptation.trainable.values())
        )
        for one_B, other in zip(found, alone, strict=True):
            torch.testing.assert_close(one_B[b], other, rtol=0, atol=1e-10)


def test_policy_and_reference_rows_have_their_terms_and_none() -> None:
    block = make_block()
    adaptation, x = adapt(block), inputs()
    seen = []

    def forward(_: nn.Module, x_BLC: Tensor, __: object) -> Tensor:
        seen.append(len(x_BLC))
        return together(block, x_BLC)

    class Rows:
        def cat(self, other: "Rows") -> "Rows":
            return self

    with torch.no_grad():
        policy, reference = adaptation.policy_and_reference(forward, (x, Rows()), (x[:2], Rows()))  # type: ignore[arg-type]
        none, alone = adaptation.policy_and_reference(forward, None, (x[:2], Rows()))  # type: ignore[arg-type]
        assert seen == [5, 2]
        assert policy is not None
        assert none is None
        torch.testing.assert_close(policy, by_definition(block, x), rtol=0, atol=1e-12)
        torch.testing.assert_close(reference, by_definition(block, x[:2], gain=0.0), rtol=0, atol=1e-12)
        torch.testing.assert_close(alone, reference, rtol=0, atol=1e-12)
        # and afterwards it is the policy again
        torch.testing.assert_close(together(block, x), by_definition(block, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("change", ["copy_", "add_", "lerp", "optimizer", "fused optimizer"])
def test_copies_follow_whatever_changes_the_factors(change: str) -> None:
    block = make_block(torch.bfloat16)
    adaptation, x = adapt(block), inputs(torch.bfloat16)
    weights = list(adaptation.trainable.values())
    before = together(block, x).detach()
    with torch.no_grad():
        if change == "copy_":
            weights[3].copy_(torch.ones_like(weights[3]))
        elif change == "add_":
            weights[0].add_(1.0)
        elif change == "lerp":
            torch._foreach_lerp_([weight.detach() for weight in weights], [torch.ones_like(w) for w in weights], 0.5)
    if "optimizer" in change:
        optimizer = torch.optim.AdamW(weights, lr=0.1, fused=change == "fused optimizer")
        together(block, x).square().mean().backward()
        optimizer.step()
        if change == "fused optimizer":
            # what PyTorch leaves out, and update does after each step
            torch.autograd.graph.increment_version(weights)
    after = together(block, x).detach()
    assert (after.float() - before.float()).abs().max() > 0.1
    exact = make_exact(block, x)
    assert (after.float() - exact).abs().max() < 0.02 * exact.abs().max()


def make_exact(block: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        parts = []
        for layer in stack_of(block):
            assert isinstance(layer, LoRALinear)
            low = F.linear(F.linear(x.float(), layer.lora_A), layer.lora_B)
            parts.append(F.linear(x.float(), layer.base.weight.float(), layer.base.bias.float()) + SCALE * low)
        return torch.cat(parts, dim=-1)


def test_factors_are_copied_once_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    block = make_block()
    adaptation, x = adapt(block), inputs()
    copied, foreach_copy = [], torch._foreach_copy_

    def count(places: list[Tensor], values: list[Tensor]) -> None:
        copied.append(len(places))
        foreach_copy(places, values)

    monkeypatch.setattr(torch, "_foreach_copy_", count)
    for _ in range(3):
        adaptation.refresh()
        together(block, x)
    # A of the three, then s B
    assert copied == [3, 3]


def test_merged_weights_stay_in_the_stack_and_come_back() -> None:
    block = make_block()
    adaptation, x = adapt(block), inputs()
    expected = by_definition(block, x).detach()
    before = [layer.base.weight.clone() for layer in stack_of(block) if isinstance(layer, LoRALinear)]
    with torch.no_grad(), adaptation.merged():
        torch.testing.assert_close(together(block, x), expected, rtol=0, atol=1e-12)
    after = [layer.base.weight for layer in stack_of(block) if isinstance(layer, LoRALinear)]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_a_layer_that_is_called_alone_is_its_part() -> None:
    block = make_block()
    adapt(block)
    x = inputs()
    torch.testing.assert_close(torch.cat([layer(x) for layer in stack_of(block)], dim=-1), by_definition(block, x))


def test_layers_that_nobody_trains_are_stacked_too_and_a_mixed_group_is_not() -> None:
    x = inputs()
    frozen, mixed = make_block(), make_block()
    expected = torch.cat([layer(x) for layer in stack_of(frozen)], dim=-1)
    frozen["other"] = nn.ModuleDict({"attn": nn.ModuleDict({"to_q": nn.Linear(4, 4)})})  # type: ignore[operator]
    adapt_other = LoRA(rank=2, targets=("to_q",))(frozen["other"])  # type: ignore[index]
    adapt_other.stack([stack_of(frozen)])
    torch.testing.assert_close(together(frozen, x), expected, rtol=0, atol=1e-12)
    storages = {storage_of(layer) for layer in stack_of(frozen)}
    assert len(storages) == 1
    adaptation = adapt(mixed, targets=("to_q", "to_v"))
    assert len(adaptation.trainable) == 4
    low = [
        SCALE * F.linear(F.linear(x, layer.lora_A), layer.lora_B) if isinstance(layer, LoRALinear) else torch.zeros(())
        for layer in stack_of(mixed)
    ]
    for found, plain, term in zip(projected(stack_of(mixed), x), expected.split(8, dim=-1), low, strict=True):
        torch.testing.assert_close(found, plain + term, rtol=0, atol=1e-12)


def test_merged_for_good_each_layer_has_memory_of_its_own() -> None:
    block = make_block()
    adaptation, x = adapt(block), inputs()
    expected = by_definition(block, x).detach()
    adaptation.merge_for_good()
    layers = stack_of(block)
    assert all(type(layer) is nn.Linear and layer.weight.is_contiguous() for layer in layers)
    assert len({storage_of(layer) for layer in layers}) == 3
    torch.testing.assert_close(together(block, x), expected, rtol=0, atol=1e-12)


def test_gradients_are_added_as_autograd_adds_them() -> None:
    block, other = make_block(), make_block()
    ours, theirs = adapt(block), adapt(other)
    for k in range(3):
        # the first loss does not reach the values
        parts = slice(0, 16 if k == 0 else 24)
        ours.backward(together(block, inputs())[..., parts].pow(k + 1).sum())
        together(other, inputs())[..., parts].pow(k + 1).sum().backward()
    for one, another in zip(ours.trainable.values(), theirs.trainable.values(), strict=True):
        assert one.grad is not None
        assert another.grad is not None
        torch.testing.assert_close(one.grad, another.grad, rtol=1e-12, atol=0)


def test_full_fine_tuning_stacks_nothing() -> None:
    block = make_block()
    adaptation = FullFineTuning(keep_reference=False)(block)
    adaptation.stack([stack_of(block)])
    assert {name for name, _ in block.named_parameters()} == set(adaptation.trainable)
    x = inputs()
    torch.testing.assert_close(together(block, x), torch.cat([layer(x) for layer in stack_of(block)], dim=-1))


def test_a_copy_that_found_no_memory_is_made_the_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    block = make_block()
    adaptation, x = adapt(block), inputs()
    multiply = torch._foreach_mul
    with monkeypatch.context() as patched:
        patched.setattr(torch, "_foreach_mul", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("none left")))
        with pytest.raises(torch.OutOfMemoryError):
            adaptation.refresh()
    assert torch._foreach_mul is multiply
    torch.testing.assert_close(together(block, x), by_definition(block, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_rows_of_a_product_are_whole_sixteen_bytes_whatever_the_rank(rank: int, dtype: torch.dtype) -> None:
    block = make_block(dtype)
    LoRA(rank=rank, targets=NAMES)(block).stack([stack_of(block)])
    layer = block.get_submodule("attn.to_q")
    assert isinstance(layer, LoRALinear)
    assert layer.base.weight.stride(0) * dtype.itemsize % 16 == 0
    assert layer.base.weight.stride(0) - WIDTH - 3 * rank < 16


def test_inputs_of_other_dimensions_are_rows_too() -> None:
    block = make_block()
    weights = list(adapt(block).trainable.values())
    for x in (inputs()[0], inputs()[:, None]):
        ours, theirs = together(block, x), by_definition(block, x)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
        pairs = zip(*(torch.autograd.grad(y.square().sum(), weights) for y in (ours, theirs)), strict=True)
        for one, other in pairs:
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("change", ["copied", "assigned"])
def test_weights_that_were_replaced_are_not_merged_into_nowhere(change: str) -> None:
    block = make_block()
    adaptation = adapt(block)
    layer = block.get_submodule("attn.to_k")
    assert isinstance(layer, LoRALinear)
    if change == "copied":
        layer.base = copy.deepcopy(layer.base)
    else:
        state = {"weight": torch.zeros(8, WIDTH, dtype=torch.float64), "bias": layer.base.bias.detach()}
        layer.base.load_state_dict(state, assign=True)
    with pytest.raises(RuntimeError, match="a frozen weight was replaced after adapters were installed"):
        adaptation.merged().__enter__()


def test_merged_for_good_nothing_of_the_stacks_stays() -> None:
    block = make_block()
    adaptation = adapt(block)
    layer = block.get_submodule("attn.to_q")
    assert isinstance(layer, LoRALinear)
    joined = weakref.ref(layer.stack._joined_OK.untyped_storage())
    del layer
    adaptation.merge_for_good()
    gc.collect()
    assert joined() is None
