"""Candidates of a noise search: their values, their distribution, and the kernel."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from fastgrpo_kernels import philox_normal, sample_candidates
from fastgrpo_kernels.sample_candidates import _sample_candidates_triton, sample_candidates_reference
from tests.kernels.parameters import DEVICES, DTYPES, covering

SEED, STREAM = 2**40 + 5, 7
# prompts, candidates and elements: a program takes 8 candidates and 512 elements
SIZES = [(1, 1, 1), (2, 3, 7), (2, 8, 512), (1, 9, 513), (3, 2, 1025), (0, 3, 4), (2, 0, 4)]


def make_moments(*shape: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mean, std = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator) + 0.1
    return mean.to(device, dtype), std.to(device, dtype)


def test_candidates_are_mean_plus_std_times_the_noise_of_their_ids() -> None:
    mean, std = make_moments(3, 2, 5)
    prompts, candidates = torch.tensor([4, 0, 9]), torch.tensor([2, 11])
    drawn = sample_candidates(mean, std, SEED, STREAM, prompts, candidates)
    noise = philox_normal(SEED, STREAM, prompts, candidates, 10).view(3, 2, 2, 5)
    assert torch.equal(drawn, noise * std[:, None] + mean[:, None])
    # one candidate of one prompt, drawn again alone
    again = sample_candidates(mean[1:2], std[1:2], SEED, STREAM, prompts[1:2], candidates[1:])
    assert torch.equal(again[0, 0], drawn[1, 1])


def test_a_latent_is_perturbed_by_one_scale_a_prompt() -> None:
    x = make_moments(3, 4, 6)[0].bfloat16()
    prompts, candidates, scale = torch.arange(3), torch.arange(2), torch.tensor([0.0, 0.5, 2.0])
    drawn = sample_candidates(x, scale, SEED, STREAM, prompts, candidates, dtype=torch.bfloat16)
    noise = philox_normal(SEED, STREAM, prompts, candidates, 24).view(3, 2, 4, 6)
    expected = x[:, None].float() + scale.view(3, 1, 1, 1) * noise
    assert torch.equal(drawn, expected.bfloat16())
    assert torch.equal(drawn[0], x[:1].expand(2, -1, -1))


def test_candidates_have_the_distribution_that_was_asked_for() -> None:
    mean, std = torch.full((1, 50_000), 1.5), torch.full((1, 50_000), 0.25)
    drawn = sample_candidates(mean, std, 3, 0, torch.tensor([8]), torch.arange(4))
    assert stats.kstest(((drawn - 1.5) / 0.25).flatten().numpy(), "norm").pvalue > 0.01
    assert abs(drawn.mean().item() - 1.5) < 4 * 0.25 / math.sqrt(drawn.numel())


@given(k=st.integers(0, 8), cut=st.integers(1, 9))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_a_candidate_does_not_depend_on_the_others(k: int, cut: int) -> None:
    mean, std = make_moments(2, 13)
    prompts, candidates = torch.arange(2), torch.arange(9)
    together = sample_candidates(mean, std, SEED, STREAM, prompts, candidates)
    assert torch.equal(sample_candidates(mean, std, SEED, STREAM, prompts, candidates[:cut]), together[:, :cut])
    own = torch.stack([candidates[k : k + 1], candidates[8 - k : 9 - k]])
    picked = sample_candidates(mean, std, SEED, STREAM, prompts, own)
    assert torch.equal(picked[:, 0], torch.stack([together[0, k], together[1, 8 - k]]))


@pytest.mark.parametrize(
    ("size", "dtype", "one_std", "own_ids"), covering(SIZES, DTYPES, [False, True], [False, True]), ids=str
)
@pytest.mark.usefixtures("poisoned_outputs")
def test_kernel_equals_reference_bit_for_bit(
    size: tuple[int, int, int], dtype: torch.dtype, one_std: bool, own_ids: bool, kernel_device: str
) -> None:
    P, K, D = size
    mean, std = make_moments(P, D, device=kernel_device, dtype=dtype)
    prompts = torch.arange(P, device=kernel_device) * 3
    shared = torch.arange(K, device=kernel_device).expand(P, -1)
    candidates_PK = 5 * shared + prompts[:, None] if own_ids else shared
    arguments = (mean, std[:, :1] if one_std else std, SEED, STREAM, prompts, candidates_PK, dtype)
    assert torch.equal(_sample_candidates_triton(*arguments), sample_candidates_reference(*arguments))


@pytest.mark.parametrize("device", DEVICES)
def test_layout_of_the_moments_does_not_matter(device: str) -> None:
    mean, std = make_moments(2, 4, 6, 5, device=device)
    prompts, candidates = torch.arange(2, device=device), torch.arange(3, device=device)
    expected = sample_candidates(mean, std, SEED, STREAM, prompts, candidates)
    other_mean, other_std = (moment.contiguous(memory_format=torch.channels_last) for moment in (mean, std))
    columns = torch.stack([candidates, -candidates], dim=1)[:, 0]
    assert torch.equal(sample_candidates(other_mean, other_std, SEED, STREAM, prompts, columns), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_operator_is_well_formed_and_compiles(device: str) -> None:
    mean, std = make_moments(2, 6, device=device)
    prompts, candidates = torch.arange(2, device=device), torch.arange(3, device=device)
    arguments = (mean, std, SEED, STREAM, prompts, candidates.expand(2, -1), torch.bfloat16)
    torch.library.opcheck(torch.ops.fastgrpo.sample_candidates.default, arguments)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def doubled(mean: Tensor, std: Tensor) -> Tensor:
        return 2 * sample_candidates(mean, std, SEED, STREAM, prompts, candidates)

    assert torch.equal(doubled(mean, std), 2 * sample_candidates(mean, std, SEED, STREAM, prompts, candidates))


def test_wrong_input_is_refused_with_the_remedy() -> None:
    mean, std = make_moments(2, 3, 4)
    arguments: dict[str, Any] = {
        "mean": mean, "std": std, "seed": 1, "stream": 2, "prompt_ids_P": torch.arange(2),
        "candidate_ids": torch.arange(3),
    }  # fmt: skip
    for change, message in (
        ({"seed": 2**63}, r"seed must be in \[0, 2\^63\), got 9223372036854775808"),
        ({"mean": mean[:1]}, r"mean must be \[P, ...\] with P = 2 .* got \(1, 3, 4\) and \(2, 3, 4\); give every"),
        ({"std": std[:, 0]}, r"std of its shape or \[P\], got \(2, 3, 4\) and \(2, 4\)"),
        ({"std": -std}, r"std must not be negative, got -1.*; 0 draws the mean itself"),
        ({"mean": mean.long()}, "mean must be floating point on cpu, got torch.int64 on cpu; cast it"),
        ({"std": std.to("meta")}, "std must be floating point on cpu, got torch.float32 on meta; .* move it"),
        ({"mean": mean.clone().requires_grad_()}, r"mean requires one; pass mean.detach\(\)"),
        ({"candidate_ids": torch.zeros(3, 2, dtype=torch.int64)}, r"candidate_ids must be int64 of shape \(2, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            sample_candidates(**{**arguments, **change})
