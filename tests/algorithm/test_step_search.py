"""The search of a step's noise on rewards in closed form: which noises it hands out, and what undoes the choice."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgrpo.algorithm.noise import GaussianNoise, NoiseDraw, SharedNoise
from fastgrpo.algorithm.search import EliteSearch
from fastgrpo.algorithm.step_candidates import StepCandidates, StepDraw
from fastgrpo.algorithm.step_search import StepSearch, drawn
from fastgrpo.types import ChosenNoise, Prompts, Samples
from fastgrpo_kernels import philox_normal

SEED, STREAM, SHAPE, IDS, G = 7, 1003, (1, 2, 3), [40, 41, 9], 4
TARGET_CHW = torch.linspace(-1.0, 1.0, 6).view(SHAPE)


def quality(noise: Tensor) -> Tensor:
    return -(noise - TARGET_CHW).square().sum(dim=(-3, -2, -1))


def philox(prompt_id: int, candidate_id: int) -> Tensor:
    return philox_normal(SEED, STREAM, torch.tensor([prompt_id]), torch.tensor([candidate_id]), 6).view(SHAPE)


def found(
    search: StepSearch,
    rows: tuple[int, ...] = tuple(range(len(IDS) * G)),
    of: Callable[[Tensor], Tensor] = quality,
) -> tuple[ChosenNoise, list[Tensor]]:
    """What a rank with these rows takes, and all candidates that all ranks scored, [A, M, C, H, W] a call."""
    prompts, seen = Prompts([""] * len(IDS), IDS), []

    def score(candidates: StepCandidates, estimate_steps: int) -> Tensor:
        assert estimate_steps == search.estimate_steps
        # those of the others: their moments are not here, but in the first round all are alike
        everyone = candidates
        if len(rows) < len(IDS) * G:
            whole = StepDraw(SEED, STREAM, Samples.all_of(prompts, G), SHAPE)
            everyone = StepCandidates(whole, candidates.first, candidates.num, whole.standard)
        noise_AMCHW = everyone.at(range(len(IDS) * G))
        seen.append(noise_AMCHW)
        return of(noise_AMCHW)

    draw = StepDraw(SEED, STREAM, Samples(prompts, G, rows), SHAPE)
    return search.choose(draw, score), seen


def estimates_of(chosen: ChosenNoise) -> Tensor:
    assert chosen.estimates_PG is not None
    return chosen.estimates_PG


def test_each_sample_takes_the_best_of_its_own_candidates_of_which_the_first_is_its_plain_noise() -> None:
    chosen, (seen,) = found(StepSearch(candidates=5, take="elites", correction="none"))
    for p, prompt_id in enumerate(IDS):
        for g in range(G):
            row = p * G + g
            expected = torch.stack([philox(prompt_id, g + G * k) for k in range(5)])
            torch.testing.assert_close(seen[row], expected, rtol=0, atol=0)
            best = quality(expected).argmax()
            assert torch.equal(chosen.noise_BCHW[row], expected[best])
            assert estimates_of(chosen)[p, g] == quality(expected)[best]
    gain = quality(seen).max(dim=1).values.mean() - quality(seen).mean()
    assert chosen.metrics == {"search/gain": pytest.approx(gain.item())}
    assert torch.equal(chosen.scale_B, torch.ones(12))
    assert torch.equal(chosen.offset_B, torch.zeros(12))


def test_a_group_that_shares_its_start_takes_the_best_of_all_its_candidates_one_each() -> None:
    chosen, (seen,) = found(StepSearch(candidates=2, shares_start=True, take="elites", correction="none"))
    # its four samples score two candidates each
    assert seen.shape[:2] == (12, 2)
    for p, prompt_id in enumerate(IDS):
        candidates = torch.stack([philox(prompt_id, k) for k in range(8)])
        order = quality(candidates).argsort(descending=True)[:G]
        assert torch.equal(chosen.noise_BCHW[p * G : p * G + G], candidates[order])
        torch.testing.assert_close(estimates_of(chosen)[p], quality(candidates)[order])


@pytest.mark.parametrize("shares_start", [False, True])
def test_the_mean_is_that_of_the_elites_of_candidates_drawn_around_the_elites_before(shares_start: bool) -> None:
    search = StepSearch(
        rounds=2, candidates=2 if shares_start else 8, elites=3, take="mean", correction="none", momentum=0.25,
        std_floor=0.4, shares_start=shares_start,
    )  # fmt: skip
    chosen, seen = found(search)
    assert [candidates.shape[1] for candidates in seen] == ([2, 2] if shares_start else [8, 8, 1])
    estimates = []
    for p, prompt_id in enumerate(IDS):
        for g in range(G):
            mean, std = torch.zeros(SHAPE), torch.ones(SHAPE)
            for r in range(2):
                ids = [k + 8 * r if shares_start else g + G * (k + 8 * r) for k in range(8)]
                candidates = torch.stack([mean + std * philox(prompt_id, k) for k in ids])
                elites = candidates[quality(candidates).argsort(descending=True)[:3]]
                mean = 0.75 * elites.mean(dim=0) + 0.25 * mean
                std = (0.75 * elites.std(dim=0, correction=0) + 0.25 * std).clamp_min(0.4)
            torch.testing.assert_close(chosen.noise_BCHW[p * G + g], mean, rtol=1e-5, atol=1e-6)
            # it is scored once more, as it is handed out, unless the whole group takes it
            estimates.append(quality(elites).mean() if shares_start else quality(mean))
    estimates_A = torch.stack(estimates)
    gain = estimates_A.mean() - quality(seen[0]).mean()
    assert chosen.metrics["search/gain"] == pytest.approx(gain.item(), rel=1e-4)
    assert (chosen.estimates_PG is None) == shares_start
    if chosen.estimates_PG is not None:
        torch.testing.assert_close(chosen.estimates_PG.flatten(), estimates_A, rtol=1e-5, atol=1e-5)


def test_fresh_noises_are_drawn_from_the_refitted_distribution_and_the_mean_may_be_put_on_the_sphere() -> None:
    settings: dict[str, Any] = {"candidates": 6, "elites": 2, "correction": "none", "std_floor": 0.1}
    mean_BCHW = found(StepSearch(take="mean", **settings))[0].noise_BCHW
    on_sphere = found(StepSearch(take="mean", project="sphere", **settings))[0].noise_BCHW
    torch.testing.assert_close(
        on_sphere, mean_BCHW * (math.sqrt(6) / mean_BCHW.flatten(1).norm(dim=1))[:, None, None, None]
    )
    fresh, (seen, _) = found(StepSearch(take="fresh", **settings))
    elites = seen[5, quality(seen[5]).topk(2).indices]
    std = elites.std(dim=0, correction=0).clamp_min(0.1)
    torch.testing.assert_close(
        fresh.noise_BCHW[5], mean_BCHW[5] + std * philox(IDS[1], 1 + G * 6), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(estimates_of(fresh)[1, 1], quality(fresh.noise_BCHW[5]))


def test_the_best_seen_may_be_of_any_round() -> None:
    chosen, seen = found(StepSearch(rounds=3, candidates=4, elites=2, take="elites", correction="none"))
    all_of_them = torch.cat(seen, dim=1)
    best = quality(all_of_them).argmax(dim=1)
    assert {index // 4 for index in best.tolist()} == {0, 1, 2}
    torch.testing.assert_close(chosen.noise_BCHW, all_of_them[torch.arange(12), best], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "search",
    [
        StepSearch(),
        StepSearch(take="elites", correction="imitate"),
        StepSearch(take="mean", correction="none"),
        StepSearch(shares_start=True, take="drawn"),
        StepSearch(shares_start=True, take="elites", correction="none"),
        StepSearch(shares_start=True, take="mean", correction="none"),
    ],
    ids=lambda search: f"{search.take}_{search.shares_start}",
)
def test_a_rank_takes_for_its_samples_what_one_rank_would(search: StepSearch) -> None:
    def of(noise: Tensor) -> Tensor:
        # the mean that is scored last is not known of the others' samples here
        return quality(noise) if noise.shape[1] > 1 else torch.zeros(noise.shape[:2])

    whole, _ = found(search, of=of)
    rows = (9, 2, 3, 11)
    part, _ = found(search, rows, of)
    for name in ("noise_BCHW", "scale_B", "offset_B"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[list(rows)])
    assert (part.estimates_PG is None) == (whole.estimates_PG is None) == search.gives_one_noise
    assert part.estimates_PG is None or torch.equal(part.estimates_PG, estimates_of(whole))
    assert part.metrics == whole.metrics


def test_candidates_are_drawn_the_more_often_the_better_they_are() -> None:
    search = StepSearch(floor=0.2, temperature=2.0)
    # 0 and 1 have the standard deviation .5: softmax of 0 and 1
    p = 0.8 * math.e / (1 + math.e) + 0.1
    torch.testing.assert_close(
        search.probabilities(torch.tensor([[0.0, 1.0], [3.0, 3.0]])),
        torch.tensor([[1 - p, p], [0.5, 0.5]], dtype=torch.float64),
    )
    # whatever the scale of the reward
    scores_SK = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(search.probabilities(5 + 100 * scores_SK), search.probabilities(scores_SK))


@pytest.mark.parametrize("num", [1, 3])
def test_weights_make_the_mean_over_draws_the_mean_over_candidates(num: int) -> None:
    # in twentieths, so that 20 * num points even in (0, 1) meet each candidate exactly as often as they should
    p_K = torch.tensor([0.1, 0.45, 0.05, 0.4], dtype=torch.float64)
    value_K = torch.tensor([3.0, -1.0, 10.0, 0.5], dtype=torch.float64)
    u_S1 = ((torch.arange(60) + 0.5) / 60)[:, None].double()
    picked_SN = drawn(p_K.expand(60, -1), u_S1, num)
    counts_K = torch.bincount(picked_SN.flatten(), minlength=4)
    torch.testing.assert_close(counts_K.double() / picked_SN.numel(), p_K)
    weights_K = 1 / (4 * p_K)
    assert (p_K * weights_K * value_K).sum().item() == pytest.approx(value_K.mean().item())
    estimate = (weights_K * value_K)[picked_SN].mean().item()
    assert estimate == pytest.approx(value_K.mean().item())


@pytest.mark.parametrize("shares_start", [False, True])
def test_what_was_drawn_carries_the_weight_of_its_probability(shares_start: bool) -> None:
    search = StepSearch(candidates=2 if shares_start else 8, shares_start=shares_start, floor=0.3)
    chosen, (seen,) = found(search)
    pools = seen.view(3, G, -1, *SHAPE).transpose(1, 2).flatten(1, 2) if shares_start else seen
    p_SK = search.probabilities(quality(pools))
    weights = []
    for row, noise in enumerate(chosen.noise_BCHW):
        pool = row // G if shares_start else row
        (k,) = (pools[pool] == noise).flatten(1).all(dim=1).nonzero().flatten().tolist()
        assert estimates_of(chosen).flatten()[row] == quality(pools[pool, k])
        weights.append(1 / (8 * p_SK[pool, k].item()))
    assert chosen.scale_B.tolist() == pytest.approx(weights)
    assert max(weights) <= 1 / 0.3
    assert len({round(weight, 6) for weight in weights}) > 3
    assert torch.equal(chosen.offset_B, torch.zeros(12))
    share = sum(weights) ** 2 / (12 * sum(weight**2 for weight in weights))
    assert chosen.metrics["search/effective_share"] == pytest.approx(share)


def test_draws_of_different_samples_and_prompts_are_their_own() -> None:
    """Of rewards that are all alike each candidate is drawn as often as any other."""
    counts, alike = torch.zeros(4), 0
    for stream in range(40):
        prompts = Prompts(["", "", ""], [3 * stream, 3 * stream + 1, 3 * stream + 2])
        draw = StepDraw(SEED, STREAM, Samples.all_of(prompts, G), SHAPE)
        chosen = StepSearch(candidates=4).choose(draw, lambda candidates, _: torch.zeros(12, 4))
        assert torch.equal(chosen.scale_B, torch.ones(12))
        candidates = StepCandidates(draw, 0, 4, draw.standard).at(range(12))
        picked = (candidates == chosen.noise_BCHW[:, None]).flatten(2).all(dim=2)
        assert (picked.sum(dim=1) == 1).all()
        counts += picked.sum(dim=0)
        # neither all of a group nor all at a place draw alike
        by_place = picked.float().argmax(dim=1).view(3, G)
        alike += int((by_place == by_place[:, :1]).all()) + int((by_place == by_place[:1]).all())
    assert alike < 5
    # 480 draws: 120 each, of standard deviation 9.5
    assert counts.sum() == 480
    assert (counts - 120).abs().max() < 40


def test_imitation_is_of_every_chosen_noise_alike() -> None:
    chosen, _ = found(StepSearch(take="elites", correction="imitate", imitation=0.75))
    assert torch.equal(chosen.scale_B, torch.zeros(12))
    assert torch.equal(chosen.offset_B, torch.full((12,), 0.75))
    assert "search/effective_share" not in chosen.metrics


def test_one_candidate_is_the_plain_noise_and_is_trained_as_it_is() -> None:
    expected = torch.stack([philox(prompt_id, g) for prompt_id in IDS for g in range(G)])
    one = StepSearch(candidates=1, elites=1)
    for search in (one, replace(one, take="elites", correction="none"), replace(one, take="mean", correction="none")):
        chosen, _ = found(search)
        assert torch.equal(chosen.noise_BCHW, expected)
        assert torch.equal(chosen.scale_B, torch.ones(12))


def test_the_start_noise_stays_plain() -> None:
    draw = NoiseDraw(seed=3, prompt_ids=IDS, group_size=G, latent_shape=SHAPE)
    score: Any = None
    for search, plain in ((StepSearch(), GaussianNoise()), (StepSearch(shares_start=True), SharedNoise())):
        noise, expected = search(draw, score), plain(draw, score)
        assert torch.equal(noise.start_BCHW, expected.start_BCHW)
        assert (noise.is_shared, noise.num_scored) == (expected.is_shared, 0)


def test_rewards_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="rewards that are not finite; check the reward of noisy images"):
        found(StepSearch(), of=lambda noise: torch.full(noise.shape[:2], math.nan))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target": "start"}, "target must be step in this search, got 'start'; use algorithm/noise=elite or"),
        *(({name: 0}, f"{name} must be at least 1, got 0") for name in ("rounds", "candidates", "elites")),
        ({"estimate_steps": 0}, "estimate_steps must be at least 1, got 0"),
        ({"take": "median"}, "take must be mean or elites or fresh or drawn, got 'median'"),
        ({"project": "best"}, "project must be none or sphere, got 'best'"),
        ({"correction": "half"}, "correction must be none or weights or imitate, got 'half'"),
        *(
            ({"temperature": value}, f"temperature must be positive and finite, got {value}; 1.0 is usual")
            for value in (0.0, -1.0, math.nan, math.inf)
        ),
        *(({"floor": value}, f"floor must be in [0, 1], got {value}; 0.2 is") for value in (-0.1, 1.1, math.nan)),
        *(({"momentum": value}, f"momentum must be in [0, 1), got {value}") for value in (-0.1, 1.0, math.nan)),
        *(({"std_floor": value}, "std_floor must be finite and not neg") for value in (-1.0, math.nan, math.inf)),
        *(({"imitation": value}, "imitation must be positive and fin") for value in (0.0, -1.0, math.nan, math.inf)),
        ({"project": "sphere"}, "project=sphere rescales the mean, got take=drawn; use take=mean"),
        ({"rounds": 2}, "take=drawn draws from candidates of the policy, which those of later rounds are not"),
        ({"take": "mean"}, "correction=weights divides by the probability of the noise that was drawn, got take=me"),
        ({"floor": 0.0}, "correction=weights divides by the probability of the noise that was drawn, got take=dra"),
    ],
    ids=str,
)  # fmt: skip
def test_a_bad_value_is_refused_by_its_full_key(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(f"algorithm.noise.{message}")):
        StepSearch(**values)


def test_the_search_of_start_noises_names_the_other() -> None:
    with pytest.raises(
        ValueError, match=r"algorithm\.noise\.target must be start in this search, got 'step'; use .*elite_step"
    ):
        EliteSearch(target="step")


def test_more_elites_than_candidates_are_refused() -> None:
    with pytest.raises(ValueError, match=r"elites must be at most the 8 candidates of a search, got 9; lower it, or"):
        StepSearch(candidates=2, elites=9, shares_start=True, take="fresh", correction="none").check_group(4)
    StepSearch(candidates=2, elites=8, shares_start=True, take="fresh", correction="none").check_group(4)
    with pytest.raises(ValueError, match=r"elites must be at most the 2 candidates of a search, got 3"):
        StepSearch(candidates=2, take="elites", rounds=2, correction="none").check_group(4)
    # where nothing is refitted there are no elites
    StepSearch(candidates=2).check_group(4)
    StepSearch(candidates=2, take="elites", correction="none").check_group(4)
