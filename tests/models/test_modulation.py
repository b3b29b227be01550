"""Modulations are computed once a (t, prompt) where their weights are frozen, and under gradient where they are not."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgrpo.models.adaptation import FullFineTuning
from fastgrpo.models.blocks.modulation import Modulations
from fastgrpo.models.lora import LoRA
from fastgrpo.models.sd3 import StableDiffusion3
from fastgrpo.types import Conditions, Time
from fastgrpo_kernels import GuidedVelocity

TEXTS = ["a red circle", "two blue squares", "a red circle"]


def make_model(weights: Path, adaptation, guidance_scale: float = 1.0) -> StableDiffusion3:
    return StableDiffusion3(
        weights=str(weights),
        adaptation=adaptation,
        resolution=64,
        guidance_scale=guidance_scale,
        max_sequence_length=0,
        use_t5=False,
    )


@pytest.fixture(scope="module")
def model(tiny_weights: Path) -> StableDiffusion3:
    return make_model(tiny_weights, LoRA(rank=4))


def latents(num_samples: int) -> Tensor:
    return torch.randn(num_samples, 16, 8, 8, generator=torch.Generator().manual_seed(3))


@contextmanager
def counted(transformer: Any) -> Iterator[list[int]]:
    """The number of rows of each embedding of time and text that is computed inside."""
    rows: list[int] = []
    hook = transformer.time_text_embed.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    try:
        yield rows
    finally:
        hook.remove()


def modulations_of(kept: Modulations, model: StableDiffusion3, t: float, conditions: Conditions) -> list[Tensor]:
    network: Any = model._network
    return list(kept(model.transformer, t, conditions, network.modulate))


def test_kept_modulations_are_those_that_are_computed_for_each_row(model: StableDiffusion3) -> None:
    conditions = model.encode(TEXTS)
    kept, computed = Modulations(is_frozen=True), Modulations(is_frozen=False)
    with torch.no_grad():
        for t in (1.0, 0.3, 1.0):
            expected = modulations_of(computed, model, t, conditions)
            found = modulations_of(kept, model, t, conditions)
            assert len(found) == len(expected) == 2 * 2 + 1
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_row_does_not_depend_on_its_company(model: StableDiffusion3) -> None:
    alone = modulations_of(Modulations(is_frozen=True), model, 0.5, model.encode(TEXTS[1:2]))
    together = modulations_of(Modulations(is_frozen=True), model, 0.5, model.encode(TEXTS))
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one[0], other[1])


def test_each_time_and_prompt_is_embedded_once(model: StableDiffusion3) -> None:
    kept = Modulations(is_frozen=True)
    with counted(model.transformer) as rows:
        for t in (1.0, 0.5, 1.0, 0.5):
            modulations_of(kept, model, t, model.encode(TEXTS).repeat(4))
        assert rows == [1, 1, 1, 1]
        modulations_of(kept, model, 0.5, model.encode(["a green triangle", TEXTS[0]]))
        assert rows == [1] * 5


def test_conditions_that_are_not_known_to_be_equal_are_not_kept(model: StableDiffusion3) -> None:
    known = model.encode(TEXTS)
    kept = Modulations(is_frozen=True)
    with counted(model.transformer) as rows:
        for _ in range(2):
            modulations_of(kept, model, 0.5, Conditions(known.embeds_BLC, known.pooled_BC))
    assert rows == [3, 3]


def test_without_a_pooled_text_a_row_serves_all_texts() -> None:
    calls: list[int] = []

    def modulate(transformer: Any, t: Time, pooled_BC: Tensor) -> Iterator[Tensor]:
        calls.append(len(pooled_BC))
        yield torch.full((len(pooled_BC), 2), float(t))
        yield torch.full((len(pooled_BC), 3), 2 * float(t))

    embeds_BLC, kept = torch.zeros(3, 1, 4), Modulations(is_frozen=True)
    for keys in ((5, 6, 7), (8, 5, 9), ()):
        for t in (0.25, 0.5):
            first, second = kept(None, t, Conditions(embeds_BLC, torch.empty(3, 0), keys), modulate)
            assert first.tolist() == [[t, t]] * 3
            assert second.tolist() == [[2 * t] * 3] * 3
    assert calls == [1, 1]
    # with a pooled text those that are not known to be equal are each computed
    list(kept(None, 0.25, Conditions(embeds_BLC, torch.zeros(3, 1)), modulate))
    assert calls == [1, 1, 3]


def test_the_least_recently_used_rows_are_dropped_at_the_limit(model: StableDiffusion3) -> None:
    conditions = model.encode(TEXTS[:1])
    row_bytes = sum(part.nbytes for part in modulations_of(Modulations(is_frozen=True), model, 1.0, conditions))
    kept = Modulations(is_frozen=True, max_bytes=3 * row_bytes)
    expected = {t: modulations_of(Modulations(is_frozen=True), model, t, conditions) for t in (0.9, 0.8, 0.7, 0.6)}
    total = 0
    for t, num_computed in (
        (0.9, 1), (0.8, 2), (0.7, 3),
        # .9 is used again, so that .8 goes when .6 comes, and .7 when .8 comes back
        (0.9, 3), (0.6, 4), (0.9, 4), (0.8, 5), (0.9, 5), (0.6, 5), (0.7, 6),
    ):  # fmt: skip
        with counted(model.transformer) as rows:
            found = modulations_of(kept, model, t, conditions)
        total += len(rows)
        assert total == num_computed, t
        assert all(torch.equal(one, other) for one, other in zip(found, expected[t], strict=True))
        assert sum(row.untyped_storage().nbytes() for row in kept._rows.values()) <= 3 * row_bytes


def test_a_batch_of_more_prompts_than_are_kept_is_still_right(model: StableDiffusion3) -> None:
    conditions = model.encode(TEXTS)
    few = modulations_of(Modulations(is_frozen=True, max_bytes=1), model, 0.5, conditions)
    many = modulations_of(Modulations(is_frozen=True), model, 0.5, conditions)
    assert all(torch.equal(one, other) for one, other in zip(few, many, strict=True))


def test_an_iteration_embeds_each_prompt_and_the_empty_one_once_a_time(tiny_weights: Path) -> None:
    model = make_model(tiny_weights, LoRA(rank=4), guidance_scale=4.5)
    conditions = model.encode(TEXTS)
    with counted(model.transformer) as rows:
        for t in (1.0, 0.7, 0.4):
            with model.sampling():
                model.velocity(latents(3), t, conditions)
            model.velocity(latents(3), t, conditions)
            model.velocity_and_reference(latents(3), t, conditions)
    # three times of two distinct prompts and the empty one, in policy, reference and merged policy alike
    assert rows == [1] * 9


def test_full_fine_tuning_keeps_none_and_learns_them(tiny_weights: Path) -> None:
    model = make_model(tiny_weights, FullFineTuning())
    conditions, x_BCHW = model.encode(TEXTS), latents(3)
    target_BCHW = latents(6)[3:]
    with counted(model.transformer) as rows:
        for _ in range(2):
            v_BCHW = model.velocity(x_BCHW, 0.7, conditions)
    assert rows == [3, 3]
    assert isinstance(v_BCHW, Tensor)
    (v_BCHW - target_BCHW).square().mean().backward()
    found = {name: weight.grad for name, weight in model.trainable.items()}
    model.transformer.zero_grad(set_to_none=True)
    # diffusers' own forward pass
    time_B = torch.full((3,), 700.0)
    v_BCHW = model.transformer(x_BCHW, conditions.embeds_BLC, conditions.pooled_BC, time_B, return_dict=False)[0]
    (v_BCHW - target_BCHW).square().mean().backward()
    learned = [name for name in model.trainable if "time_text_embed" in name or "norm1" in name or "norm_out" in name]
    assert len(learned) == 8 + 2 * 2 * 2 + 2
    for name in learned:
        expected = model.trainable[name].grad
        assert expected is not None
        assert expected.abs().max() > 1e-6, name
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_a_policy_that_moved_is_not_modulated_as_before(tiny_weights: Path) -> None:
    model = make_model(tiny_weights, FullFineTuning(), guidance_scale=2.0)
    with torch.no_grad(), model.sampling():
        before = model.velocity(latents(3), 0.7, model.encode(TEXTS))
        for weight in model.transformer.time_text_embed.parameters():
            weight.mul_(1.5)
        after = model.velocity(latents(3), 0.7, model.encode(TEXTS))
    assert isinstance(before, GuidedVelocity)
    assert isinstance(after, GuidedVelocity)
    assert not torch.allclose(before.conditional, after.conditional, atol=1e-3)
