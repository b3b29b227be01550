import math
from dataclasses import replace

import pytest
import torch

from fastgrpo.algorithm.noise import GaussianNoise, NoiseDraw, SharedNoise, rank_correlation
from fastgrpo.algorithm.search import BestOfK, EliteSearch, RandomSearch

PROPOSALS = [
    GaussianNoise(),
    SharedNoise(),
    EliteSearch(rounds=2, candidates=6, elites=3, mix=0.5),
    EliteSearch(rounds=2, candidates=6, elites=3, start="mean", project="none"),
    EliteSearch(rounds=2, candidates=6, elites=3, fresh=True),
    BestOfK(candidates=3),
    RandomSearch(candidates=6),
]


def make_draw(prompt_ids=(0, 1, 2), group_size=4, iteration=0):
    return NoiseDraw(
        seed=7, prompt_ids=list(prompt_ids), group_size=group_size, latent_shape=(2, 3, 3), iteration=iteration,
        num_iterations=11,
    )  # fmt: skip


def score(candidates, estimate_steps):
    return -(candidates.all() - 1.0).square().mean(dim=(2, 3, 4))


def groups(noise, draw):
    return noise.start_BCHW.unflatten(0, (len(draw.prompt_ids), draw.group_size))


def test_a_draw_is_a_function_of_global_indices():
    together = make_draw([4, 9])(stream=1, num=5)
    torch.testing.assert_close(make_draw([9])(stream=1, num=2, first=3)[0], together[1, 3:], rtol=0, atol=0)
    assert not torch.equal(make_draw([4, 9])(stream=2, num=5), together)
    assert together.shape == (2, 5, 2, 3, 3)


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_prompts_together_or_alone_start_from_the_same_noise(proposal):
    draw = make_draw(prompt_ids=range(6))
    together = groups(proposal(draw, score), draw)
    alone = [proposal(replace(draw, prompt_ids=[p]), score).start_BCHW for p in range(6)]
    torch.testing.assert_close(together, torch.stack(alone), rtol=0, atol=0)


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_a_rank_starts_its_own_samples_from_the_noise_that_all_together_would(proposal):
    draw = make_draw(prompt_ids=range(6))
    together = proposal(draw, score)
    # neither in order nor of whole groups; the second rank may have no sample of a searched prompt
    for rows in ((23, 2, 3, 9, 0), (17,), tuple(range(12, 24))):
        alone = proposal(replace(draw, rows=rows), score)
        assert torch.equal(alone.start_BCHW, together.start_BCHW[list(rows)])
        assert alone.metrics == together.metrics
        assert (alone.estimates_PG is None) == (together.estimates_PG is None)
        if together.estimates_PG is not None:
            torch.testing.assert_close(alone.estimates_PG, together.estimates_PG, rtol=0, atol=0, equal_nan=True)


def test_a_decision_is_drawn_for_each_prompt_in_each_iteration():
    ids = range(1000)
    first, second = (torch.tensor(make_draw(ids, iteration=i).uniform(2000), dtype=torch.float64) for i in (0, 1))
    assert make_draw([7], iteration=1).uniform(2000) == [second[7].item()]
    for u in (first, second):
        # uniform: of a thousand, the largest distance of their distribution from it
        assert (u.sort().values - torch.linspace(0, 1, 1000, dtype=torch.float64)).abs().max() < 0.06
    assert torch.corrcoef(torch.stack([first, second]))[0, 1].abs() < 0.15


def test_gaussian_noise_is_distinct_and_shared_noise_is_its_first():
    draw = make_draw()
    plain = groups(GaussianNoise()(draw, score), draw)
    shared = groups(SharedNoise()(draw, score), draw)
    assert len({tuple(z.flatten().tolist()) for z in plain.flatten(0, 1)}) == 12
    assert torch.equal(shared, plain[:, :1].expand_as(shared))


def test_rank_correlation_by_hand():
    a_PG = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert rank_correlation(a_PG, a_PG.exp()) == pytest.approx(1.0)
    assert rank_correlation(a_PG, -a_PG) == pytest.approx(-1.0)
    # sum of squared rank differences 1 + 1 + 1 + 1: 1 - 6 * 4 / (4 * 15)
    assert rank_correlation(a_PG, torch.tensor([[20.0, 10.0, 40.0, 30.0]])) == pytest.approx(0.6)
    # ranks 1.5 1.5 3 4: covariance 4.5 over sqrt(5 * 4.5)
    assert rank_correlation(a_PG, torch.tensor([[5.0, 5.0, 6.0, 7.0]])) == pytest.approx(4.5 / 22.5**0.5)


def test_rank_correlation_leaves_out_prompts_that_have_none():
    a_PG = torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.0, 1.0], [math.nan, math.nan, math.nan]])
    b_PG = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    assert rank_correlation(a_PG, b_PG) == pytest.approx(1.0)
    assert math.isnan(rank_correlation(a_PG[1:], b_PG[1:]))
