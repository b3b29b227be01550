"""The searches on a reward in closed form: minus the squared distance to a target."""

import math
from dataclasses import replace

import pytest
import torch

from fastgrpo.algorithm.noise import GaussianNoise, NoiseDraw, rank_correlation
from fastgrpo.algorithm.search import BestOfK, EliteSearch, RandomSearch

TARGET_CHW = torch.linspace(-1.5, 1.5, 16).view(1, 4, 4)
DIMENSION = 16


class QuadraticReward:
    """Remembers every candidate it scored."""

    def __init__(self):
        self.seen, self.estimate_steps, self.prompt_ids = [], set(), []

    def __call__(self, candidates, estimate_steps):
        noise_PKCHW = candidates.all()
        assert noise_PKCHW.shape[:2] == (len(candidates.prompt_ids), candidates.num)
        self.seen.append(noise_PKCHW)
        self.prompt_ids += candidates.prompt_ids
        self.estimate_steps.add(estimate_steps)
        return self.exact(noise_PKCHW)

    @staticmethod
    def exact(noise):
        return -(noise - TARGET_CHW).square().sum(dim=(-3, -2, -1))

    @property
    def num_scored(self):
        return sum(z.shape[0] * z.shape[1] for z in self.seen)

    @property
    def seen_PK(self):
        return self.exact(torch.cat(self.seen, dim=1))


def run(search, num_prompts=5, group_size=4, iteration=0, num_iterations=11):
    draw = NoiseDraw(
        seed=3, prompt_ids=list(range(num_prompts)), group_size=group_size, latent_shape=(1, 4, 4), iteration=iteration,
        num_iterations=num_iterations,
    )  # fmt: skip
    reward = QuadraticReward()
    noise = search(draw, reward)
    return noise, noise.start_BCHW.unflatten(0, (num_prompts, group_size)), reward, draw


def test_the_mean_moves_to_the_optimum():
    search = EliteSearch(rounds=15, candidates=128, elites=16, start="mean", project="none")
    noise, start_PGCHW, _, _ = run(search)
    assert (start_PGCHW - TARGET_CHW).abs().max() < 0.15
    assert torch.equal(start_PGCHW, start_PGCHW[:, :1].expand_as(start_PGCHW))
    assert noise.metrics["search/gain"] > 10
    assert noise.estimates_PG is None


def test_one_round_refits_the_elites_by_hand():
    search = EliteSearch(rounds=1, candidates=8, elites=3, start="mean", project="none")
    _, start_PGCHW, reward, _ = run(search)
    best = reward.seen_PK.topk(3, dim=1).indices
    for p in range(5):
        torch.testing.assert_close(start_PGCHW[p, 0], reward.seen[0][p, best[p]].mean(dim=0))


def test_the_second_round_draws_from_the_refit_with_momentum_and_floor():
    search = EliteSearch(
        rounds=2, candidates=8, elites=1, start="mean", project="none", momentum=0.25, std_floor=0.5, estimate_steps=3
    )
    _, _, reward, draw = run(search)
    elite_P = reward.exact(reward.seen[0]).argmax(dim=1)
    elite_PCHW = reward.seen[0][torch.arange(5), elite_P]
    # one elite has no spread: std = .25 * 1 + .75 * 0, below its floor
    expected = 0.75 * elite_PCHW[:, None] + 0.5 * draw(2, 8)
    torch.testing.assert_close(reward.seen[1], expected)
    assert reward.estimate_steps == {3}


def test_a_shared_mean_is_projected_to_the_sphere_at_the_end():
    search = EliteSearch(rounds=2, candidates=8, elites=4, start="mean", project="sphere")
    _, start_PGCHW, reward, _ = run(search)
    _, unprojected_PGCHW, same_reward, _ = run(replace(search, project="none"))
    norm = start_PGCHW.flatten(2).norm(dim=2)
    torch.testing.assert_close(norm, torch.full_like(norm, DIMENSION**0.5), rtol=1e-6, atol=0)
    cosine = torch.cosine_similarity(start_PGCHW.flatten(2), unprojected_PGCHW.flatten(2), dim=2)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))
    # the search itself is the same: candidates of later rounds are not drawn around a projected mean
    assert torch.equal(reward.seen_PK, same_reward.seen_PK)


def test_candidates_of_every_round_have_the_norm_of_plain_noise():
    _, _, reward, _ = run(EliteSearch(rounds=3, candidates=64, elites=8), num_prompts=50)
    # elites of this reward lie where the target does, so compare with the norm that the elites of the round before had
    for before, after in zip(reward.seen, reward.seen[1:], strict=False):
        best_PT = reward.exact(before).topk(8, dim=1).indices
        elites = before[torch.arange(50)[:, None], best_PT]
        # the floor of std adds at most .05^2 an element
        square_before, square_after = (z.square().sum(dim=(2, 3, 4)).mean().item() for z in (elites, after))
        assert square_after == pytest.approx(square_before, rel=0.03)


@pytest.mark.parametrize("weights", ["rank", "softmax"])
def test_weighted_refits_by_hand(weights):
    search = EliteSearch(candidates=8, elites=3, start="mean", project="none", weights=weights, temperature=0.5)
    _, start_PGCHW, reward, _ = run(search)
    best = reward.seen_PK.topk(3, dim=1)
    for p in range(5):
        rewards = best.values[p].double()
        if weights == "rank":
            share = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
        else:
            share = torch.exp((rewards - rewards.max()) / (0.5 * rewards.std(correction=0)))
        expected = (share / share.sum()) @ reward.seen[0][p, best.indices[p]].double().flatten(1)
        torch.testing.assert_close(start_PGCHW[p, 0].flatten(), expected.float(), rtol=1e-5, atol=1e-6)


def test_mppi_beats_plain_noise_and_finds_the_optimum():
    search = EliteSearch(rounds=15, candidates=128, elites=128, start="mean", project="none", weights="softmax",
                         temperature=0.3)  # fmt: skip
    _, start_PGCHW, _, _ = run(search)
    assert (start_PGCHW - TARGET_CHW).abs().max() < 0.15


def test_elites_are_the_best_seen_over_all_rounds():
    search = EliteSearch(rounds=2, candidates=3, elites=2, project="none")
    noise, start_PGCHW, reward, _ = run(search, group_size=5)
    best_first = reward.seen_PK.sort(dim=1, descending=True).values
    torch.testing.assert_close(reward.exact(start_PGCHW), best_first[:, :5])
    torch.testing.assert_close(noise.estimates_PG, best_first[:, :5])
    assert rank_correlation(noise.estimates_PG, reward.exact(start_PGCHW)) == pytest.approx(1.0)
    assert all(len(torch.unique(group, dim=0)) == 5 for group in start_PGCHW)
    # drawn again by their ids, they are what was scored, bit for bit
    assert torch.equal(reward.exact(start_PGCHW), noise.estimates_PG)


@pytest.mark.parametrize("group_size", [1, 4, 5])
def test_contrast_is_the_best_and_the_worst_seen(group_size):
    search = EliteSearch(rounds=1, candidates=8, elites=2, start="contrast", project="none")
    noise, _, reward, _ = run(search, group_size=group_size)
    best_first = reward.seen_PK.sort(dim=1, descending=True).values
    worst = group_size // 2
    expected = torch.cat([best_first[:, : group_size - worst], best_first[:, 8 - worst :]], dim=1)
    torch.testing.assert_close(noise.estimates_PG, expected)


def test_project_best_shares_the_single_best_candidate():
    search = EliteSearch(rounds=3, candidates=4, elites=2, start="mean", project="best")
    _, start_PGCHW, reward, _ = run(search)
    best_PG = reward.seen_PK.amax(dim=1, keepdim=True).expand(5, 4)
    torch.testing.assert_close(reward.exact(start_PGCHW), best_PG)


def test_fresh_elites_are_new_draws_from_the_refit():
    search = EliteSearch(rounds=1, candidates=8, elites=3, project="none", fresh=True)
    noise, start_PGCHW, reward, draw = run(search)
    elites = reward.seen[0][torch.arange(5)[:, None], reward.seen_PK.topk(3, dim=1).indices]
    expected = elites.mean(dim=1, keepdim=True) + elites.std(dim=1, keepdim=True, correction=0) * draw(2, 4)
    torch.testing.assert_close(start_PGCHW, expected)
    assert noise.estimates_PG is None


def test_gain_is_what_the_elites_have_over_the_first_candidates():
    noise, _, reward, _ = run(EliteSearch(rounds=2, candidates=6, elites=2))
    first, last = (reward.exact(z) for z in reward.seen)
    expected = (last.topk(2, dim=1).values.mean(dim=1) - first.mean(dim=1)).mean().item()
    assert noise.metrics["search/gain"] == pytest.approx(expected)


def test_mix_leaves_a_share_of_the_prompts_with_plain_noise():
    search = EliteSearch(candidates=4, elites=2, mix=0.3)
    noise, start_PGCHW, reward, draw = run(search, num_prompts=400)
    plain = GaussianNoise()(draw, QuadraticReward()).start_BCHW.view_as(start_PGCHW)
    is_plain_P = (start_PGCHW == plain).flatten(1).all(dim=1)
    assert is_plain_P.float().mean().item() == pytest.approx(0.3, abs=0.07)
    assert noise.metrics["search/share"] == pytest.approx(1 - is_plain_P.float().mean().item())
    assert torch.equal(noise.estimates_PG.isnan().all(dim=1), is_plain_P)
    torch.testing.assert_close(noise.estimates_PG[~is_plain_P], reward.exact(start_PGCHW[~is_plain_P]))
    # a prompt that keeps plain noise costs no score
    assert reward.prompt_ids == [p for p in range(400) if not is_plain_P[p]]
    assert noise.num_scored == reward.num_scored == 4 * len(reward.prompt_ids)


def test_anneal_lowers_the_searched_share_linearly():
    search = EliteSearch(mix=0.2, anneal=0.5)
    assert [search.searched_share(i, 11) for i in (0, 5, 10)] == pytest.approx([0.8, 0.6, 0.4])
    assert search.searched_share(0, 1) == pytest.approx(0.8)
    search = EliteSearch(candidates=4, elites=2, anneal=0.5)
    shares = [run(search, num_prompts=400, iteration=i)[0].metrics["search/share"] for i in (0, 5, 10)]
    assert shares == pytest.approx([1.0, 0.75, 0.5], abs=0.07)


@pytest.mark.parametrize("iteration", [0, 1, 3])
def test_which_prompts_are_searched_has_nothing_to_do_with_the_noise_that_is_drawn(iteration):
    _, _, reward, draw = run(EliteSearch(candidates=4, elites=2, mix=0.5), 2000, iteration=iteration)
    is_searched_P = torch.zeros(2000, dtype=torch.bool)
    is_searched_P[reward.prompt_ids] = True
    # start noise, the candidates of two rounds and the noise of two steps; the first of all draws of a stream
    for stream in (0, 1, 2, 1000, 1001):
        noise_PX = draw(stream, 4).flatten(1)
        difference_X = noise_PX[is_searched_P].mean(dim=0) - noise_PX[~is_searched_P].mean(dim=0)
        # of two means of a thousand: 5 standard deviations
        assert difference_X.abs().max() < 5 * math.sqrt(2 / 1000)


def test_nothing_is_scored_when_no_prompt_is_searched():
    noise, start_PGCHW, reward, draw = run(EliteSearch(anneal=0.0), iteration=10)
    assert (noise.num_scored, reward.num_scored, noise.estimates_PG) == (0, 0, None)
    assert torch.equal(start_PGCHW.flatten(0, 1), GaussianNoise()(draw, reward).start_BCHW)


def test_best_of_k_shared_and_distinct():
    noise, start_PGCHW, reward, _ = run(BestOfK(candidates=6, start="shared"))
    assert noise.num_scored == reward.num_scored == 5 * 6
    torch.testing.assert_close(reward.exact(start_PGCHW), reward.seen_PK.amax(dim=1, keepdim=True).expand(5, 4))

    noise, start_PGCHW, reward, _ = run(BestOfK(candidates=6, start="distinct"))
    assert noise.num_scored == reward.num_scored == 5 * 4 * 6
    own_best_PG = reward.seen_PK.view(5, 4, 6).amax(dim=2)
    torch.testing.assert_close(reward.exact(start_PGCHW), own_best_PG)
    torch.testing.assert_close(noise.estimates_PG, own_best_PG)


@pytest.mark.parametrize("start", ["shared", "distinct"])
def test_random_search_scores_as_many_candidates_and_gains_nothing(start):
    noise, start_PGCHW, reward, _ = run(RandomSearch(rounds=3, candidates=8, start=start), num_prompts=300)
    elite, _, _, _ = run(EliteSearch(rounds=3, candidates=8, elites=3), num_prompts=300)
    assert noise.num_scored == reward.num_scored == elite.num_scored == 300 * 3 * 8
    torch.testing.assert_close(reward.exact(start_PGCHW), noise.estimates_PG)
    assert abs(noise.metrics["search/gain"]) < 0.2 * elite.metrics["search/gain"]
    assert torch.equal(start_PGCHW[:, 0], start_PGCHW[:, 1]) == (start == "shared")


def test_a_failed_reward_is_never_taken_for_the_best():
    draw = NoiseDraw(0, [0], group_size=1, latent_shape=(1, 4, 4))
    with pytest.raises(ValueError, match="rewards that are not finite"):
        BestOfK()(draw, lambda candidates, _: torch.full((1, candidates.num), math.nan))
    with pytest.raises(ValueError, match=r"score must return \(1, 8\) rewards, got \(1,\)"):
        BestOfK()(draw, lambda candidates, _: torch.zeros(1))


@pytest.mark.parametrize("search", [EliteSearch(candidates=3, elites=1), RandomSearch(candidates=3)])
def test_more_samples_than_candidates_are_refused(search):
    with pytest.raises(ValueError, match=r"hands out 4 .*noises of only rounds \* candidates = 3"):
        run(search)
