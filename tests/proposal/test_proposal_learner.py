"""The score function's gradient, that it leads uphill, and who is learned from."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from fastgrpo.algorithm.advantage import GroupAdvantage
from fastgrpo.algorithm.learned_noise import LearnedNoise
from fastgrpo.algorithm.noise import NoiseDraw
from fastgrpo.proposal.learner import NothingLearned, ProposalLearner
from fastgrpo.proposal.network import ProposalNetwork
from fastgrpo.types import Conditions, Noise, Prompts, Samples
from tests.proposal.test_proposal_network import LATENT, SHAPE, make_conditions, make_network

NUM_PROMPTS, GROUP = 4, 3
SAMPLES = Samples.all_of(Prompts(["a"] * NUM_PROMPTS, [7, 1, 0, 3]), GROUP)
CONDITIONS = make_conditions().repeat(GROUP)
ADVANTAGES = torch.randn(NUM_PROMPTS * GROUP, generator=torch.Generator().manual_seed(8))


def no_score(candidates: object, estimate_steps: int) -> Tensor:
    raise AssertionError("nothing is searched")


def make_draw(learner: ProposalLearner | NothingLearned, conditions_P: Conditions, group: int = GROUP) -> NoiseDraw:
    def moments(places: Sequence[int], latent_shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        return learner.moments(conditions_P.take(places), latent_shape)

    return NoiseDraw(5, SAMPLES.prompts.ids, group, LATENT, moments=moments)


def make_noise(learner: ProposalLearner, mix: float = 0.0) -> Noise:
    return LearnedNoise(mix=mix)(make_draw(learner, make_conditions()), no_score)


def test_the_gradient_at_plain_noise_by_hand() -> None:
    """d log N(z; m, 1) / dm = z, and dm by the map's bias is one for its own element."""
    learner = ProposalLearner(ProposalNetwork(replace(SHAPE, learns_std=False)), 1e-2)
    noise = make_noise(learner)
    learner.learn(SAMPLES, CONDITIONS, noise, ADVANTAGES, ADVANTAGES.view(NUM_PROMPTS, GROUP))
    expected_D = -(ADVANTAGES[:, None].double() * noise.start_BCHW.flatten(1).double()).mean(dim=0)
    # of the first step the average is a tenth of the gradient
    found_D = learner.optimizer.state[learner.network.map.bias]["exp_avg"] / 0.1
    torch.testing.assert_close(found_D, expected_D)
    torch.testing.assert_close(learner.network.map.bias.detach(), -1e-2 * expected_D.sign(), rtol=1e-5, atol=0)


def test_the_gradient_is_that_of_a_normal_distribution() -> None:
    learner = ProposalLearner(make_network(0.3), 1e-2)
    noise, network = make_noise(learner), learner.network
    mean_BCHW, std_BCHW = network(CONDITIONS, LATENT)
    log_prob_B = Normal(mean_BCHW, std_BCHW).log_prob(noise.start_BCHW.double()).sum(dim=(1, 2, 3))
    weights = list(network.parameters())
    expected = torch.autograd.grad(-(ADVANTAGES.double() * log_prob_B).mean(), weights)
    kl_P = torch.distributions.kl_divergence(Normal(mean_BCHW, std_BCHW), Normal(0.0, 1.0)).sum(dim=(1, 2, 3))
    metrics = learner.learn(SAMPLES, CONDITIONS, noise, ADVANTAGES, ADVANTAGES.view(NUM_PROMPTS, GROUP))
    for weight, gradient in zip(weights, expected, strict=True):
        torch.testing.assert_close(learner.optimizer.state[weight]["exp_avg"] / 0.1, gradient)
    assert metrics["proposal/kl"] == pytest.approx(kl_P.mean().item())
    assert metrics["proposal/grad_norm"] == pytest.approx(torch.stack([g.norm() for g in expected]).norm().item())
    assert "proposal/gain" not in metrics


def test_groups_on_plain_noise_are_plain_to_the_bit_and_not_learned_from() -> None:
    learner = ProposalLearner(make_network(0.3), 1e-2)
    noise = make_noise(learner, mix=0.5)
    assert set(noise.learned_P) == {True, False}
    plain = make_draw(learner, make_conditions()).starts(0).unflatten(0, (NUM_PROMPTS, GROUP))
    learned = make_noise(learner).start_BCHW.unflatten(0, (NUM_PROMPTS, GROUP))
    for place, is_learned in enumerate(noise.learned_P):
        expected = learned if is_learned else plain
        assert torch.equal(noise.start_BCHW.unflatten(0, (NUM_PROMPTS, GROUP))[place], expected[place])
        assert not torch.equal(learned[place], plain[place])
    rewards_PG = torch.arange(12.0).view(NUM_PROMPTS, GROUP) ** 2
    is_learned_P = torch.tensor(noise.learned_P)
    metrics, steps = [], []
    for of_plain in (0.0, 100.0):
        again = ProposalLearner(make_network(0.3), 1e-2)
        advantages_PG = torch.where(is_learned_P[:, None], ADVANTAGES.view(NUM_PROMPTS, GROUP), of_plain)
        metrics.append(again.learn(SAMPLES, CONDITIONS, noise, advantages_PG.flatten(), rewards_PG))
        steps.append(again.tensors)
    assert all(torch.equal(steps[0][name], steps[1][name]) for name in steps[0])
    assert metrics[0] == metrics[1]
    gain = rewards_PG[is_learned_P].mean() - rewards_PG[~is_learned_P].mean()
    assert metrics[0]["proposal/gain"] == pytest.approx(gain.item())
    # the mean is over those that were drawn: with the others left out, there is as much to learn
    rows = [row for row in SAMPLES.rows if noise.learned_P[row // GROUP]]
    drawn = noise.start_BCHW[rows].double()
    mean_BCHW, std_BCHW = learner.network(CONDITIONS.take(rows), LATENT)
    log_prob_B = Normal(mean_BCHW, std_BCHW).log_prob(drawn).sum(dim=(1, 2, 3))
    (expected_F,) = torch.autograd.grad(-(ADVANTAGES[rows].double() * log_prob_B).mean(), [learner.network.map.bias])
    torch.testing.assert_close(steps[0]["exp_avg/map.bias"] / 0.1, expected_F)


def test_it_learns_a_reward_that_is_linear_in_the_noise_and_differs_by_prompt() -> None:
    network = ProposalNetwork(replace(SHAPE, learns_std=False, max_kl=8.0, width=16), seed=2)
    learner, conditions_P = ProposalLearner(network, 1e-2), make_conditions()
    wanted_PCHW = torch.randn(NUM_PROMPTS, *LATENT, generator=torch.Generator().manual_seed(1))
    wanted_PCHW /= wanted_PCHW.flatten(1).norm(dim=1)[:, None, None, None]
    group = 16
    means = []
    for iteration in range(150):
        prompts = Prompts(["a"] * NUM_PROMPTS, [iteration * NUM_PROMPTS + p for p in range(NUM_PROMPTS)])
        samples = Samples.all_of(prompts, group)
        draw = replace(make_draw(learner, conditions_P, group), prompt_ids=prompts.ids)
        noise = LearnedNoise()(draw, no_score)
        rewards_PG = (noise.start_BCHW.unflatten(0, (-1, group)) * wanted_PCHW[:, None]).sum(dim=(2, 3, 4))
        advantages_B = GroupAdvantage()(rewards_PG).flatten()
        metrics = learner.learn(samples, conditions_P.repeat(group), noise, advantages_B, rewards_PG)
        means.append(rewards_PG.mean().item())
        assert metrics["proposal/kl"] < 8.0
    assert abs(sum(means[:5]) / 5) < 0.3
    # a shift by d costs d^2 / 2 nats: the best of 8 nats would be 4 less what the shell takes
    assert sum(means[-10:]) / 10 > 1.8


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    learner = ProposalLearner(make_network(0.3), 1e-2)
    before = {name: tensor.clone() for name, tensor in learner.tensors.items()}
    advantages_B = ADVANTAGES.clone()
    advantages_B[4] = torch.nan
    learner.learn(SAMPLES, CONDITIONS, make_noise(learner), advantages_B, ADVANTAGES.view(NUM_PROMPTS, GROUP))
    assert all(torch.equal(before[name], tensor) for name, tensor in learner.tensors.items())


def test_what_was_learned_is_loaded_with_the_optimizers_averages() -> None:
    first, second = ProposalLearner(make_network(0.3), 1e-2), ProposalLearner(ProposalNetwork(SHAPE), 1e-2)
    assert first.tensors.keys() == second.tensors.keys()

    def learn(learner: ProposalLearner) -> None:
        learner.learn(SAMPLES, CONDITIONS, make_noise(learner), ADVANTAGES, ADVANTAGES.view(NUM_PROMPTS, GROUP))

    learn(first)
    second.load({name: tensor.clone() for name, tensor in first.tensors.items()})
    learn(first)
    learn(second)
    assert all(torch.equal(first.tensors[name], tensor) for name, tensor in second.tensors.items())


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("max_kl", 0.0, "max_kl must be positive and finite, got 0.0; use algorithm/noise=gaussian"),
        ("learning_rate", float("inf"), "learning_rate must be positive"),
        ("width", 0, "width must be at least 1"),
        ("cells", 0, "cells must be at least 1"),
        ("mix", 1.0, r"mix must lie in \[0, 1\), got 1.0; use algorithm/noise=gaussian"),
    ],
)
def test_values_that_cannot_be_are_refused(field: str, value: float, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        LearnedNoise(**{field: value})  # type: ignore[arg-type]
