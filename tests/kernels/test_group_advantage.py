"""Advantages within groups: values, exactness, properties, and the kernel."""

import math
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastgrpo_kernels import group_advantage
from fastgrpo_kernels.group_advantage import _group_advantage_triton, group_advantage_reference
from tests.kernels.parameters import BACKEND, DEVICES, covering

Std = Literal["group", "global", "none"]
STDS: list[Std] = ["group", "global", "none"]
# arithmetic is float64: results differ by one rounding
TOLERANCE: dict[str, Any] = {"rtol": 3e-7, "atol": 1e-7}
SIZES = [1, 7, 128, 129, 300]
EPS = 1e-4


def make_groups(size: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Rewards and labels: groups of different sizes, not sorted, their labels negative, zero and beyond 32 bits."""
    generator = torch.Generator().manual_seed(0)
    rewards_B = torch.randn(size, generator=generator)
    # the smaller of two draws is often small
    groups_B = torch.randint(0, 9, (2, size), generator=generator).amin(dim=0)
    return rewards_B.to(device), ((groups_B - 2) * 2**33).to(device)


def one_by_one(rewards: list[float], groups: list[int], std: Std, clamp: float) -> list[float]:
    """The definition, sample by sample."""

    def mean(values: list[float]) -> float:
        return math.fsum(values) / len(values)

    def deviation(values: list[float]) -> float:
        return math.sqrt(mean([(value - mean(values)) ** 2 for value in values]))

    advantages = []
    for reward, group in zip(rewards, groups, strict=True):
        members = [r for r, g in zip(rewards, groups, strict=True) if g == group]
        divisor = {"group": deviation(members) + EPS, "global": deviation(rewards) + EPS, "none": 1.0}[std]
        advantages.append(max(-clamp, min(clamp, (reward - mean(members)) / divisor)))
    return advantages


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("std", "divisors"),
    [
        ("none", (1.0, 1.0)),
        ("group", ((2 / 3) ** 0.5 + EPS, 1.5 + EPS)),
        # around the mean of all five, 3.4: 0.36 + 5.76 + 1.96 + 12.96 + 0.16
        ("global", ((21.2 / 5) ** 0.5 + EPS,) * 2),
    ],
)
def test_values_by_hand(std: Std, divisors: tuple[float, float], device: str) -> None:
    # group 7 has rewards 1, 2, 3 and group -1 has 4 and 7: their means are 2 and 5.5
    rewards_B, groups_B = torch.tensor([4.0, 1.0, 2.0, 7.0, 3.0]), torch.tensor([-1, 7, 7, -1, 7])
    a, b = divisors
    advantage_B = group_advantage(rewards_B.to(device), groups_B.to(device), std=std)
    expected = torch.tensor([-1.5 / b, -1 / a, 0, 1.5 / b, 1 / a])
    torch.testing.assert_close(advantage_B.cpu(), expected, **TOLERANCE)


@pytest.mark.parametrize("std", STDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("device", DEVICES)
def test_equals_the_definition(size: int, std: Std, device: str) -> None:
    rewards_B, groups_B = make_groups(size, device)
    advantage_B = group_advantage(rewards_B, groups_B, std=std, clamp=1.5)
    expected = torch.tensor(one_by_one(rewards_B.tolist(), groups_B.tolist(), std, clamp=1.5))
    torch.testing.assert_close(advantage_B.cpu(), expected, **TOLERANCE)


@pytest.mark.parametrize("std", STDS)
@pytest.mark.parametrize("size", [0, *SIZES])
@pytest.mark.usefixtures("poisoned_outputs")
def test_the_kernel_equals_its_reference(size: int, std: Std, kernel_device: str) -> None:
    arguments = *make_groups(size, kernel_device), std, EPS, 1.5
    torch.testing.assert_close(_group_advantage_triton(*arguments), group_advantage_reference(*arguments), **TOLERANCE)


@pytest.mark.gpu
@pytest.mark.parametrize("std", STDS)
def test_the_kernel_equals_its_reference_at_fifty_thousand(std: Std) -> None:
    generator = torch.Generator().manual_seed(0)
    rewards_B = torch.randn(50_001, generator=generator)
    groups_B = torch.randint(0, 3000, (50_001,), generator=generator)
    advantage_B = group_advantage(rewards_B.cuda(), groups_B.cuda(), std=std)
    torch.testing.assert_close(advantage_B.cpu(), group_advantage(rewards_B, groups_B, std=std), **TOLERANCE)


@pytest.mark.parametrize(
    ("size", "reward", "std"), covering([1, 24, 131], [0.1, 1e30, 3.4e38, -1e-40, 0.3333333], STDS)
)
@pytest.mark.usefixtures("poisoned_outputs")
def test_a_group_of_equal_rewards_has_exactly_no_advantage(
    size: int, reward: float, std: Std, kernel_device: str
) -> None:
    rewards_B = torch.cat([torch.full((size,), reward), torch.tensor([-3.0, 0.0, 1e20])]).to(kernel_device)
    groups_B = torch.tensor([5] * size + [6] * 3, device=kernel_device)
    for function in (_group_advantage_triton, group_advantage_reference):
        advantage_B = function(rewards_B, groups_B, std, 1e-30, math.inf)
        assert advantage_B[:size].eq(0).all()
        assert advantage_B[size:].ne(0).all()
        assert function(rewards_B[:size], groups_B[:size], std, 1e-30, math.inf).eq(0).all()


def test_rewards_far_from_zero_keep_their_differences(kernel_device: str) -> None:
    # float32 has no number between 4096 and 4096 + 1/2048: a mean in float32 would be off by a third of the advantage
    rewards_B = 4096 + torch.tensor([0.0, 1.0, 1.0], device=kernel_device) / 1024
    groups_B = torch.zeros(3, dtype=torch.int64, device=kernel_device)
    for function in (_group_advantage_triton, group_advantage_reference):
        advantage_B = function(rewards_B, groups_B, "none", EPS, 1.0).cpu()
        torch.testing.assert_close(advantage_B, torch.tensor([-2.0, 1.0, 1.0]) / 3072, **{**TOLERANCE, "atol": 1e-10})


def test_the_kernel_takes_any_layout(kernel_device: str) -> None:
    rewards_B, groups_B = make_groups(60, kernel_device)
    strided = _group_advantage_triton(rewards_B[::2], groups_B[::2], "group", EPS, 5.0)
    contiguous = _group_advantage_triton(rewards_B[::2].contiguous(), groups_B[::2].contiguous(), "group", EPS, 5.0)
    assert torch.equal(strided, contiguous)


@pytest.mark.parametrize("std", STDS)
@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf])
@pytest.mark.usefixtures("poisoned_outputs")
def test_a_reward_that_is_not_finite_makes_its_group_nan(reward: float, std: Std, kernel_device: str) -> None:
    rewards_B = torch.tensor([1.0, 2.0, reward, 4.0, 5.0], device=kernel_device)
    groups_B = torch.tensor([0, 1, 0, 1, 0], device=kernel_device)
    for function in (_group_advantage_triton, group_advantage_reference):
        is_nan = function(rewards_B, groups_B, std, EPS, 5.0).isnan().tolist()
        assert is_nan == ([True] * 5 if std == "global" else [True, False, True, False, True])


@pytest.mark.parametrize("device", DEVICES)
def test_outliers_are_clamped(device: str) -> None:
    rewards_B, groups_B = torch.zeros(100, device=device), torch.zeros(100, dtype=torch.int64, device=device)
    rewards_B[7], rewards_B[8] = 1.0, -1.0
    clamped_B = group_advantage(rewards_B, groups_B, std="group", clamp=2.5)
    assert (clamped_B[7].item(), clamped_B[8].item()) == (2.5, -2.5)
    unlimited_B = group_advantage(rewards_B, groups_B, std="group", clamp=math.inf)
    assert unlimited_B[7].item() == pytest.approx(1 / (0.02**0.5 + EPS))


rewards_and_groups = st.lists(st.tuples(st.floats(-10, 10, width=32), st.integers(-3, 3)), min_size=1, max_size=40)


@given(samples=rewards_and_groups, std=st.sampled_from(STDS))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_advantages_of_a_group_sum_to_zero(samples: list[tuple[float, int]], std: Std) -> None:
    rewards, groups = zip(*samples, strict=True)
    advantage_B = group_advantage(torch.tensor(rewards), torch.tensor(groups), std=std, clamp=math.inf)
    sums = torch.zeros(7).index_add(0, torch.tensor(groups) + 3, advantage_B)
    torch.testing.assert_close(sums, torch.zeros(7), rtol=0, atol=1e-4)


@given(samples=rewards_and_groups, std=st.sampled_from(STDS), data=st.data())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_order_and_names_of_groups_and_shifts_of_rewards_do_not_matter(
    samples: list[tuple[float, int]], std: Std, data: st.DataObject
) -> None:
    rewards_B, groups_B = (torch.tensor(values) for values in zip(*samples, strict=True))
    # a shift that rounding does not touch
    rewards_B = (rewards_B * 1024).round() / 1024
    expected = group_advantage(rewards_B, groups_B, std=std)
    order = torch.tensor(data.draw(st.permutations(range(len(samples)))))
    names = torch.tensor(data.draw(st.permutations([-(2**62), -5, 0, 1, 3, 2**40, 2**62])))
    changed = group_advantage(rewards_B[order] + 64, names[groups_B[order] + 3], std=std)
    torch.testing.assert_close(changed, expected[order], **TOLERANCE)


@pytest.mark.parametrize("device", DEVICES)
def test_layout_and_dtype_do_not_matter(device: str) -> None:
    rewards_B, groups_B = make_groups(60, device)
    rewards_B = rewards_B.bfloat16()
    expected = group_advantage(rewards_B[::2].float().contiguous(), groups_B[::2].contiguous())
    assert torch.equal(group_advantage(rewards_B[::2], groups_B[::2]), expected)
    assert torch.equal(group_advantage(rewards_B.double()[::2], groups_B[::2]), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("std", STDS)
def test_the_operator_is_well_formed(std: Std, device: str) -> None:
    rewards_B, groups_B = make_groups(10, device)
    torch.library.opcheck(torch.ops.fastgrpo.group_advantage.default, (rewards_B[::2], groups_B[::2], std, EPS, 5.0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("std", STDS)
def test_compiles_into_one_graph(std: Std, device: str) -> None:
    rewards_B, groups_B = make_groups(10, device)
    compiled = torch.compile(group_advantage, fullgraph=True, backend=BACKEND)
    expected = group_advantage(rewards_B, groups_B, std=std)
    torch.testing.assert_close(compiled(rewards_B, groups_B, std=std), expected)


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu() -> None:
    rewards_B, groups_B = make_groups(300, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        group_advantage(rewards_B, groups_B)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_wrong_input_is_refused_with_the_remedy() -> None:
    rewards_B, groups_B = make_groups(3)
    arguments: dict[str, Any] = {"rewards_B": rewards_B, "groups_B": groups_B}
    for change, message in (
        ({"std": "batch"}, "std must be group, global or none, got 'batch'"),
        ({"eps": 0.0}, "eps must be positive and finite, got 0.0; 1e-4 is Flow-GRPO's"),
        ({"eps": math.nan}, "eps must be positive and finite, got nan"),
        ({"clamp": 0.0}, "clamp must be positive, got 0.0; use math.inf for no limit"),
        ({"clamp": math.nan}, "clamp must be positive, got nan"),
        ({"rewards_B": rewards_B[None]}, r"rewards_B must be a floating-point vector, got .* \(1, 3\); flatten it"),
        ({"rewards_B": groups_B}, r"rewards_B must be a floating-point vector, got torch.int64 .* cast it"),
        ({"rewards_B": rewards_B.clone().requires_grad_()}, r"requires one; pass rewards_B.detach\(\)"),
        ({"groups_B": groups_B[:2]}, r"groups_B must be int64 of shape \(3,\) on cpu, got .* \(2,\) on cpu; pass the"),
        ({"groups_B": groups_B.int()}, r"groups_B must be int64 .*, got torch.int32"),
        ({"groups_B": groups_B.to("meta")}, r"groups_B must be int64 of shape \(3,\) on cpu, got .* on meta"),
    ):
        with pytest.raises(ValueError, match=message):
            group_advantage(**{**arguments, **change})
