"""The refit: equal to a plain one over stored candidates, whatever the weights, and the kernel."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastgrpo_kernels import elite_weights, philox_normal, refit_moments, sample_candidates
from fastgrpo_kernels.refit_moments import _refit_moments_triton, refit_moments_reference
from tests.kernels.parameters import DEVICES, covering

SEED, STREAM = 2**40 + 5, 7
NAMES = ("mean", "std", "seed", "stream", "prompt_ids_P", "elite_ids_PT", "weights_PT")
# a sum over elites in another order, of values up to 6.8
TOLERANCE: dict[str, Any] = {"rtol": 2e-6, "atol": 2e-6}
# prompts, candidates, elites and elements, of which a program takes 1024
SIZES = [(1, 1, 1, 1), (2, 8, 3, 7), (1, 32, 16, 1024), (2, 4, 4, 1025), (1, 9, 2, 2049), (0, 3, 2, 4)]


def make_refit(P: int, K: int, T: int, *shape: int, device: str = "cpu") -> dict[str, Any]:
    """Arguments of `refit_moments`: elites picked out of K candidates, another choice for each prompt."""
    generator = torch.Generator().manual_seed(P * K * T)
    mean, std = torch.randn(P, *shape, generator=generator), torch.rand(P, *shape, generator=generator) + 0.1
    elites_PT = torch.stack([torch.randperm(K, generator=generator)[:T] for _ in range(P)]) if P else torch.empty(0, T)
    weights_PT = torch.rand(P, T, generator=generator) + 0.01
    arguments = {
        "mean": mean,
        "std": std,
        "prompt_ids_P": 3 * torch.arange(P),
        "elite_ids_PT": elites_PT.long(),
        "weights_PT": weights_PT / weights_PT.sum(dim=1, keepdim=True),
    }
    return {"seed": SEED, "stream": STREAM, **{name: value.to(device) for name, value in arguments.items()}}


def plain_refit(
    candidates_PKD: Tensor, refit: dict[str, Any], momentum: float, std_floor: float
) -> tuple[Tensor, Tensor]:
    """Over stored candidates, in float64."""
    P = len(candidates_PKD)
    elites_PTD = candidates_PKD.double()[torch.arange(P)[:, None], refit["elite_ids_PT"]]
    weights_PT1 = refit["weights_PT"].double()[:, :, None]
    mean_PD = (weights_PT1 * elites_PTD).sum(dim=1)
    std_PD = (weights_PT1 * (elites_PTD - mean_PD[:, None]).square()).sum(dim=1).sqrt()
    old_mean_PD, old_std_PD = refit["mean"].double().flatten(1), refit["std"].double().flatten(1)
    mean_PD = (1 - momentum) * mean_PD + momentum * old_mean_PD
    std_PD = ((1 - momentum) * std_PD + momentum * old_std_PD).clamp_min(std_floor)
    return mean_PD.float(), std_PD.float()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("momentum", "std_floor"), [(0.0, 0.0), (0.3, 0.0), (0.0, 0.4), (0.9, 0.1)])
@pytest.mark.parametrize(("P", "K", "T"), [(1, 1, 1), (3, 8, 3), (2, 32, 16), (4, 5, 5)])
def test_equals_a_plain_refit_over_stored_candidates(
    P: int, K: int, T: int, momentum: float, std_floor: float, device: str
) -> None:
    refit = make_refit(P, K, T, 2, 45, device=device)
    candidates = sample_candidates(
        refit["mean"], refit["std"], SEED, STREAM, refit["prompt_ids_P"], torch.arange(K, device=device)
    )
    mean, std = refit_moments(**refit, momentum=momentum, std_floor=std_floor)
    on_cpu = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in refit.items()}
    mean_PD, std_PD = plain_refit(candidates.flatten(2).cpu(), on_cpu, momentum, std_floor)
    assert mean.shape == std.shape == refit["mean"].shape
    torch.testing.assert_close(mean.flatten(1).cpu(), mean_PD, **TOLERANCE)
    # a square root magnifies what rounding leaves of no spread
    torch.testing.assert_close(std.flatten(1).cpu(), std_PD, rtol=2e-6, atol=1e-5)


def test_by_hand() -> None:
    mean, std, prompts = torch.zeros(1, 6), torch.ones(1, 6), torch.tensor([2])
    a, b = philox_normal(SEED, STREAM, prompts, torch.tensor([4, 1]), 6)[0]
    weights = torch.tensor([[0.75, 0.25]])
    refit_mean, refit_std = refit_moments(mean, std, SEED, STREAM, prompts, torch.tensor([[4, 1]]), weights)
    torch.testing.assert_close(refit_mean[0], 0.75 * a + 0.25 * b)
    # var = .75 * .25 * (a - b)^2
    torch.testing.assert_close(refit_std[0], (0.75 * 0.25) ** 0.5 * (a - b).abs())


def test_one_elite_has_no_spread_at_all() -> None:
    refit = make_refit(2, 4, 1, 50)
    mean, std = refit_moments(**refit)
    assert std.abs().max() == 0
    candidates = sample_candidates(
        refit["mean"], refit["std"], SEED, STREAM, refit["prompt_ids_P"], refit["elite_ids_PT"]
    )
    torch.testing.assert_close(mean, candidates[:, 0])


def test_projection_rescales_the_mean_to_the_norm_of_plain_noise() -> None:
    refit = make_refit(3, 8, 4, 16, 8, 8)
    free, free_std = refit_moments(**refit)
    projected, std = refit_moments(**refit, project=True)
    norm_P = projected.flatten(1).norm(dim=1)
    torch.testing.assert_close(norm_P, torch.full_like(norm_P, 1024**0.5), rtol=1e-6, atol=0)
    scale_P = 1024**0.5 / free.flatten(1).norm(dim=1)
    torch.testing.assert_close(projected, free * scale_P.view(3, 1, 1, 1))
    assert torch.equal(std, free_std)


@given(T=st.integers(1, 12), seed=st.integers(0, 2**63 - 1))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_mean_and_std_together_keep_the_square_of_the_elites(T: int, seed: int) -> None:
    # so the next round's candidates have the norm that the elites had, and need no projection
    refit = {**make_refit(2, 12, T, 40), "seed": seed}
    mean, std = refit_moments(**refit)
    elites_PTD = sample_candidates(
        refit["mean"], refit["std"], seed, STREAM, refit["prompt_ids_P"], refit["elite_ids_PT"]
    )
    square = (refit["weights_PT"][:, :, None] * elites_PTD.square()).sum(dim=1)
    torch.testing.assert_close(mean.square() + std.square(), square, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("size", "one_std", "project"), covering(SIZES, [False, True], [False, True]), ids=str)
@pytest.mark.usefixtures("poisoned_outputs")
def test_kernel_equals_reference(
    size: tuple[int, int, int, int], one_std: bool, project: bool, kernel_device: str
) -> None:
    refit = make_refit(*size, device=kernel_device)
    refit["std"] = refit["std"][:, :1] if one_std else refit["std"]
    arguments = (*(refit[name] for name in NAMES), 0.25, 0.05, project)
    results, expected = _refit_moments_triton(*arguments), refit_moments_reference(*arguments)
    torch.testing.assert_close(results[0], expected[0], **TOLERANCE)
    torch.testing.assert_close(results[1], expected[1], rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_operator_is_well_formed_and_compiles(device: str) -> None:
    refit = make_refit(2, 8, 3, 6, device=device)
    arguments: list[Any] = [refit[name] for name in NAMES]
    torch.library.opcheck(torch.ops.fastgrpo.refit_moments.default, (*arguments, 0.1, 0.01, True))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def total(*arguments: Any) -> Tensor:
        mean, std = refit_moments(*arguments, project=True)
        return mean + std

    mean, std = refit_moments(*arguments, project=True)
    assert torch.equal(total(*arguments), mean + std)


def test_elites_without_weight_do_not_count() -> None:
    refit = make_refit(1, 8, 4, 20)
    refit["weights_PT"] = torch.tensor([[0.0, 0.5, 0.0, 0.5]])
    alone = {**refit, "elite_ids_PT": refit["elite_ids_PT"][:, 1::2], "weights_PT": torch.tensor([[0.5, 0.5]])}
    torch.testing.assert_close(refit_moments(**refit), refit_moments(**alone))
    if not torch.cuda.is_available():
        arguments: list[Any] = [*(refit[name] for name in NAMES), 0.0, 0.0, False]
        torch.testing.assert_close(_refit_moments_triton(*arguments), refit_moments(**refit))


def test_weights_by_hand() -> None:
    rewards = torch.tensor([[4.0, 2.0, 0.0]])
    assert elite_weights(rewards).tolist() == [pytest.approx([1 / 3] * 3)]
    assert elite_weights(rewards, "rank").tolist() == [pytest.approx([1 / 2, 1 / 3, 1 / 6])]
    # std = sqrt(8 / 3); at that temperature the rewards are apart by 1
    softmax = elite_weights(rewards, "softmax", temperature=2 / (8 / 3) ** 0.5)
    assert softmax.tolist() == [pytest.approx([0.66524096, 0.24472847, 0.09003057])]
    assert elite_weights(torch.full((2, 4), 0.1), "softmax").tolist() == [[0.25] * 4] * 2


@given(
    rewards=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=9),
    kind=st.sampled_from(["uniform", "rank", "softmax"]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_weights_fall_with_the_reward_and_sum_to_one(rewards: list[float], kind: Any) -> None:
    weights_T = elite_weights(torch.tensor([sorted(rewards, reverse=True)]), kind)[0]
    assert weights_T.sum().item() == pytest.approx(1, abs=1e-5)
    assert (weights_T.diff() <= 1e-7).all()


def test_wrong_input_is_refused_with_the_remedy() -> None:
    refit = make_refit(2, 8, 3, 6)
    for change, message in (
        ({"elite_ids_PT": torch.zeros(2, 0, dtype=torch.int64)}, r"elite_ids_PT must be \[P, T\] with T at least 1"),
        ({"elite_ids_PT": torch.zeros(1, 3, dtype=torch.int64)}, r"candidate_ids must be int64 of shape \(2, 3\)"),
        ({"weights_PT": torch.ones(2, 2)}, r"weights_PT must be float32 of shape \(2, 3\) .*; use elite_weights"),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\), got 1.0; 0 keeps nothing"),
        ({"std_floor": -0.1}, "std_floor must not be negative, got -0.1; 0 is no floor"),
        ({"mean": torch.zeros(2, 7)}, r"std of its shape or \[P\], got \(2, 7\) and \(2, 6\)"),
    ):
        with pytest.raises(ValueError, match=message):
            refit_moments(**{**refit, **change})
    for kind, temperature, message in (
        ("median", 1.0, "kind must be uniform, rank or softmax, got 'median'"),
        ("softmax", 0.0, "temperature must be positive and finite, got 0.0; use kind='uniform'"),
    ):
        with pytest.raises(ValueError, match=message):
            elite_weights(torch.ones(1, 2), kind, temperature)  # type: ignore[arg-type]
