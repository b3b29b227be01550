"""Noise by index: the published integers, the documented layout, the distribution, and the kernel."""

import math
import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from fastgrpo_kernels import philox_normal, philox_uint32
from fastgrpo_kernels.philox import _box_muller, _philox_normal_triton, philox_normal_reference
from tests.kernels.parameters import DEVICES, DTYPES, covering

# of the exact normals; between devices there is no difference
TOLERANCES: dict[str, Any] = {"rtol": 0.0, "atol": 2e-6}
BIG_IDS = [0, 1, 2**31 + 5, 2**32 - 1]
SEEDS_STREAMS = [(0, 0), (1, 1), (2**40 + 16, 2**32 - 1)]


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_integers_are_the_published_vectors_of_philox_4x32_10(counter: str, key: str, words: str) -> None:
    c0, c1, c2, c3 = (ids(int(word, 16)) for word in counter.split())
    k0, k1 = (int(word, 16) for word in key.split())
    assert " ".join(f"{word.item():08x}" for word in philox_uint32((c0, c1, c2, c3), (k0, k1))) == words


def normal_of_layout(seed: int, stream: int, prompt: int, candidate: int, i: int) -> float:
    """The module's docstring, one element at a time in Python's integers and floats."""
    c, k = [i // 4, candidate % 2**32, prompt % 2**32, stream], [seed % 2**32, seed // 2**32]
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ k[0], b % 2**32, (a >> 32) ^ c[3] ^ k[1], a % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    radius_word, angle_word = c[:2] if i % 4 < 2 else c[2:]
    radius = math.sqrt(-2 * math.log(radius_word * 2**-32 + 2**-33))
    return radius * (math.sin if i % 2 else math.cos)(angle_word * 2**-32 * 2 * math.pi)


@pytest.mark.parametrize(("seed", "stream"), [(0, 0), (42, 1003), (2**40 + 7, 1), (2**63 - 1, 2**32 - 1)])
def test_normals_follow_the_documented_layout(seed: int, stream: int) -> None:
    prompts, candidates, numel = [0, 3, 2**40 + 9], [7, 2**32 - 1], 10
    drawn = philox_normal(seed, stream, ids(*prompts), ids(*candidates), numel)
    expected = [[[normal_of_layout(seed, stream, p, k, i) for i in range(numel)] for k in candidates] for p in prompts]
    torch.testing.assert_close(drawn, torch.tensor(expected), **TOLERANCES)


@given(
    seed=st.integers(0, 2**63 - 1),
    prompts=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=4),
    candidates=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=4),
    numel=st.integers(1, 70),
    data=st.data(),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_an_element_does_not_depend_on_what_is_drawn_with_it(
    seed: int, prompts: list[int], candidates: list[int], numel: int, data: st.DataObject
) -> None:
    together = philox_normal(seed, 3, ids(*prompts), ids(*candidates), numel)
    p = data.draw(st.integers(0, len(prompts) - 1))
    k = data.draw(st.integers(0, len(candidates) - 1))
    shorter = data.draw(st.integers(1, numel))
    alone = philox_normal(seed, 3, ids(prompts[p]), ids(candidates[k]), shorter)
    assert torch.equal(alone[0, 0], together[p, k, :shorter])


@pytest.fixture(scope="module")
def draws_PKD() -> Tensor:
    return philox_normal(2510_02654, 0, torch.arange(12), torch.arange(32), 1024)


def test_ten_million_draws_are_standard_normal() -> None:
    draws = philox_normal(2510_02654, 0, torch.arange(20), torch.arange(8), 62_500).flatten().double()
    assert draws.numel() == 10**7
    error = 1 / math.sqrt(draws.numel())
    # four standard errors of each moment: Var(z) = 1, Var(z^2) = 2, Var(z^3) = 15, Var(z^4) = 96
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(draws.pow(power).mean().item() - expected) < 4 * math.sqrt(variance) * error, f"moment {power}"
    # Kolmogorov and Smirnov's distance, at the edges of bins of equal probability: sorting takes ten times as long
    num_bins = 2**16
    below = torch.bincount((torch.special.ndtr(draws) * num_bins).long(), minlength=num_bins).cumsum(0)
    distance = (below / draws.numel() - torch.arange(1, num_bins + 1) / num_bins).abs().max().item()
    assert stats.kstwobign.sf(distance / error) > 0.01
    # the tails must be there: 633 beyond 4 and 5.7 beyond 5 are expected
    assert 533 <= (draws.abs() > 4).sum() <= 733
    assert 1 <= (draws.abs() > 5).sum() <= 14


def test_candidates_each_are_standard_normal(draws_PKD: Tensor) -> None:
    p_values = [stats.kstest(draw.numpy(), "norm").pvalue for draw in draws_PKD.flatten(0, 1)[:96]]
    assert stats.kstest(p_values, "uniform").pvalue > 0.01


def assert_independent(a: Tensor, b: Tensor) -> None:
    """Neither the values nor their squares correlate, beyond four standard errors, and sums stay normal."""
    a, b = a.flatten().double(), b.flatten().double()
    limit = 4 / math.sqrt(a.numel())
    for first, second in ((a, b), (a.square(), b.square()), (a, b.square()), (a.square(), b)):
        assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1].item()) < limit
    assert stats.kstest(((a + b) / math.sqrt(2)).numpy(), "norm").pvalue > 0.01


def test_neighbouring_prompts_candidates_and_elements_are_independent(draws_PKD: Tensor) -> None:
    assert_independent(draws_PKD[::2], draws_PKD[1::2])
    assert_independent(draws_PKD[:, ::2], draws_PKD[:, 1::2])
    for offset in (1, 2, 3):
        assert_independent(draws_PKD[..., ::4], draws_PKD[..., offset::4])
    assert_independent(draws_PKD[..., :512], draws_PKD[..., 512:])


@pytest.mark.parametrize(("seed", "stream"), [(7, 1), (8, 0), (7 + 2**32, 0), (7, 1000)])
def test_neighbouring_seeds_and_streams_are_independent(seed: int, stream: int) -> None:
    prompts, candidates = torch.arange(4), torch.arange(8)
    a, b = philox_normal(7, 0, prompts, candidates, 1024), philox_normal(seed, stream, prompts, candidates, 1024)
    assert_independent(a, b)


def test_no_two_indices_share_their_noise() -> None:
    seeds, small = (0, 1, 2**32), torch.arange(6)
    first = [philox_normal(seed, stream, small, small, 2) for seed in seeds for stream in range(6)]
    rows = torch.cat(first).reshape(-1, 2)
    assert torch.unique(rows, dim=0).shape[0] == len(seeds) * 6 * 6 * 6


@pytest.mark.parametrize(
    ("seed_stream", "numel", "own_ids"),
    covering(SEEDS_STREAMS, [1, 2048, 2049, 7], [False, True], together=1),
    ids=str,
)
@pytest.mark.usefixtures("poisoned_outputs")
def test_kernel_equals_reference_bit_for_bit(
    seed_stream: tuple[int, int], numel: int, own_ids: bool, kernel_device: str
) -> None:
    prompts, shared = ids(*BIG_IDS).to(kernel_device), ids(*BIG_IDS[::-1], 12).to(kernel_device)[::2].expand(4, -1)
    candidates_PK = shared + prompts[:, None] if own_ids else shared
    arguments = (*seed_stream, prompts, candidates_PK, numel, torch.float32)
    assert torch.equal(_philox_normal_triton(*arguments), philox_normal_reference(*arguments))


@pytest.mark.usefixtures("poisoned_outputs")
def test_no_candidates_are_drawn(kernel_device: str) -> None:
    no_ids_PK = ids(*BIG_IDS).to(kernel_device).expand(4, -1)[:, :0]
    drawn = _philox_normal_triton(1, 1, ids(*BIG_IDS).to(kernel_device), no_ids_PK, 7, torch.float32)
    assert drawn.shape == (4, 0, 7)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_kernel_rounds_to_the_dtype(dtype: torch.dtype, kernel_device: str) -> None:
    prompts, candidates_PK = ids(3, 4).to(kernel_device), ids(0, 1, 2).expand(2, -1).to(kernel_device)
    drawn = _philox_normal_triton(5, 6, prompts, candidates_PK, 70, dtype)
    assert torch.equal(drawn, philox_normal_reference(5, 6, prompts, candidates_PK, 70, torch.float32).to(dtype))


@pytest.mark.gpu
def test_gpu_draws_what_the_cpu_draws_bit_for_bit() -> None:
    prompts, candidates = torch.arange(12), torch.arange(32)
    drawn = philox_normal(5, 2, prompts.cuda(), candidates.cuda(), 16 * 64 * 64)
    assert torch.equal(drawn.cpu(), philox_normal(5, 2, prompts, candidates, 16 * 64 * 64))


def test_ids_of_each_prompt_and_ids_of_all_prompts_draw_alike() -> None:
    prompts, candidates = ids(3, 5), ids(7, 1, 4)
    shared = philox_normal(1, 2, prompts, candidates, 9)
    own = philox_normal(1, 2, prompts, torch.stack([candidates.flip(0), candidates]), 9)
    assert torch.equal(own, torch.stack([shared[0].flip(0), shared[1]]))


def test_the_rarest_words_give_finite_exact_normals() -> None:
    # the smallest and largest words, and those around the borders of the polynomials
    edges = [0, 1, 2, 2**23, 2**24 - 1, 2**24, 2**31, 0xB504F333, 2**32 - 257, 2**32 - 129, 2**32 - 128, 2**32 - 1]
    words = ids(*{min(max(edge + step, 0), 2**32 - 1) for edge in edges for step in (-1, 0, 1)})
    radius_word, angle_word = torch.meshgrid(
        words, torch.cat([words, ids(*(k * 2**29 for k in range(8)))]), indexing="ij"
    )
    first, second = _box_muller(radius_word.clone(), angle_word.clone())
    # the float32 nearest to w + 1/2, as the docstring's arithmetic has it
    radius = (-2 * ((radius_word.float() + 0.5).double() * 2**-32).log()).clamp_min(0).sqrt()
    angle = angle_word.double() * 2**-32 * 2 * math.pi
    torch.testing.assert_close(first.double(), radius * angle.cos(), **TOLERANCES)
    torch.testing.assert_close(second.double(), radius * angle.sin(), **TOLERANCES)


@pytest.mark.parametrize("device", DEVICES)
def test_operator_is_well_formed(device: str) -> None:
    arguments = (3, 1, ids(0, 1).to(device), ids(4, 5).expand(2, -1).to(device), 6, torch.bfloat16)
    torch.library.opcheck(torch.ops.fastgrpo.philox_normal.default, arguments)


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_into_one_graph_for_any_seed(device: str) -> None:
    prompts, candidates = ids(3, 1).to(device), ids(2, 9).to(device)

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def scaled(seed: int) -> Tensor:
        return 2 * philox_normal(seed, 4, prompts, candidates, 5)

    for seed in (11, 12, 2**40):
        assert torch.equal(scaled(seed), 2 * philox_normal(seed, 4, prompts, candidates, 5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, r"seed must be in \[0, 2\^63\), got -1; reduce it"),
        ({"stream": 2**32}, r"stream must be in \[0, 2\^32\), got 4294967296; reduce it"),
        ({"numel": 0}, r"numel must be .* got 0; pass the number of elements"),
        ({"numel": 2**31}, r"numel must be .* got 2147483648; pass the number of elements"),
        ({"prompt_ids_P": torch.zeros(2, dtype=torch.int32)}, r"prompt_ids_P .* torch.int32 .*; pass torch.tensor"),
        ({"prompt_ids_P": torch.tensor(3)}, r"prompt_ids_P must be int64 of shape \[number of ids\] .* \(\)"),
        ({"candidate_ids": torch.zeros(2, 3, dtype=torch.int64)}, r"candidate_ids must be .* shape \(1, 3\)"),
        ({"candidate_ids": torch.zeros(1, dtype=torch.int64, device="meta")}, "on cpu, got .* on meta; pass torch.ten"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_input_is_refused_with_the_remedy(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"seed": 0, "stream": 0, "prompt_ids_P": ids(0), "candidate_ids": ids(0), "numel": 4}
    with pytest.raises(ValueError, match=message):
        philox_normal(**{**arguments, **change})


def test_a_search_pool_is_drawn_in_milliseconds_on_one_core() -> None:
    prompts, candidates = torch.arange(12), torch.arange(32)
    seconds = []
    for _ in range(20):
        start = time.process_time()
        philox_normal(0, 1, prompts, candidates, 1024)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.04
