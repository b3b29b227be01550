"""The learned distribution: where it begins, how far it may go, what it reads of a text, and its files."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from fastgrpo.algorithm.noise import START_STREAM, NoiseDraw
from fastgrpo.proposal.files import load_proposal, save_proposal
from fastgrpo.proposal.network import ProposalNetwork, ProposalShape, bounded, features, kl
from fastgrpo.types import Conditions

SHAPE = ProposalShape(channels=2, text_width=5, width=7, cells=3, learns_std=True, max_kl=4.0)
LATENT = (2, 3, 3)


def make_conditions(num: int = 4, width: int = 5) -> Conditions:
    generator = torch.Generator().manual_seed(3)
    return Conditions(torch.randn(num, 6, 8, generator=generator), torch.randn(num, width, generator=generator))


def make_network(scale: float, shape: ProposalShape = SHAPE) -> ProposalNetwork:
    """As if it had learned something."""
    network, generator = ProposalNetwork(shape, seed=1), torch.Generator().manual_seed(4)
    with torch.no_grad():
        for weight in network.map.parameters():
            weight.copy_(scale * torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    return network


@pytest.mark.parametrize("learns_std", [True, False])
def test_it_begins_at_plain_noise_to_the_bit(learns_std: bool) -> None:
    network = ProposalNetwork(replace(SHAPE, learns_std=learns_std))
    mean_BCHW, std_BCHW = network.moments(make_conditions(), LATENT)
    assert torch.equal(mean_BCHW, torch.zeros(4, *LATENT))
    assert torch.equal(std_BCHW, torch.ones(4, *LATENT))
    draw = NoiseDraw(5, [8, 2], 2, LATENT)
    assert torch.equal(network.starts(draw, START_STREAM, make_conditions()), draw.starts(START_STREAM))


@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0, 100.0])
@pytest.mark.parametrize("latent", [LATENT, (2, 4, 7)])
@pytest.mark.parametrize("learns_std", [True, False])
def test_it_stays_within_its_nats_and_on_the_shell(scale: float, latent: tuple[int, ...], learns_std: bool) -> None:
    network = make_network(scale, replace(SHAPE, learns_std=learns_std))
    mean_BCHW, std_BCHW = network(make_conditions(), latent)
    assert mean_BCHW.shape == (4, *latent)
    expected_B = kl_divergence(Normal(mean_BCHW, std_BCHW), Normal(0.0, 1.0)).sum(dim=(1, 2, 3))
    torch.testing.assert_close(kl(mean_BCHW, std_BCHW), expected_B)
    assert (expected_B < SHAPE.max_kl).all()
    assert (expected_B > (0.3 * SHAPE.max_kl if scale >= 1 else 0)).all()
    norm2_B = (mean_BCHW.square() + std_BCHW.square()).sum(dim=(1, 2, 3))
    torch.testing.assert_close(norm2_B, torch.full((4,), float(math.prod(latent)), dtype=torch.float64))


def test_bounded_by_hand() -> None:
    # q = 4 (1/2) 3^2 = 18 and k^2 = 6 / 24, so the mean is 1.5 before and 1.5 / sqrt(1.5^2 + 1) after the division
    m_BCHW = torch.full((1, 1, 2, 2), 3.0, dtype=torch.float64)
    mean_BCHW, std_BCHW = bounded(m_BCHW, torch.zeros_like(m_BCHW), 6.0)
    assert mean_BCHW.flatten().tolist() == pytest.approx([1.5 / 3.25**0.5] * 4)
    assert std_BCHW.flatten().tolist() == pytest.approx([3.25**-0.5] * 4)
    assert kl(mean_BCHW, std_BCHW).item() == pytest.approx(4 * math.log(3.25**0.5))
    # of the std: 2 (log 2)^2, which is more than (1/4 - 1) / 2 + log 2, and 2 ((4 - 1) / 2 - log 2)
    s_BCHW = torch.tensor([-1.0, -1.0, 1.0, 1.0], dtype=torch.float64).view(1, 1, 2, 2) * math.log(2)
    k = (6 / (6 + 2 * math.log(2) ** 2 + 3 - 2 * math.log(2))) ** 0.5
    _, std_BCHW = bounded(torch.zeros_like(s_BCHW), s_BCHW, 6.0)
    r = ((2 ** (2 * k) + 2 ** (-2 * k)) / 2) ** 0.5
    assert std_BCHW.flatten().tolist() == pytest.approx([2**-k / r] * 2 + [2**k / r] * 2)


def test_prompts_together_or_alone_and_on_other_ranks_start_from_the_same_noise() -> None:
    network, conditions = make_network(0.5), make_conditions()
    draw = NoiseDraw(5, [8, 2], 2, LATENT)
    together = network.starts(draw, START_STREAM, conditions)
    assert (together - draw.starts(START_STREAM)).abs().max() > 0.1
    alone = network.starts(replace(draw, rows=(3, 0)), START_STREAM, conditions.take([3, 0]))
    assert torch.equal(alone, together[[3, 0]])


def test_a_map_is_interpolated_to_other_resolutions() -> None:
    network = make_network(0.01)
    with torch.no_grad():
        network.map.weight.zero_()
        # one number a channel, whatever the cell
        network.map.bias.copy_(torch.tensor([0.1, -0.2, 0.0, 0.0], dtype=torch.float64).repeat_interleave(9))
    own, larger = (network(make_conditions(), shape)[0] for shape in (LATENT, (2, 5, 8)))
    for mean_BCHW in (own, larger):
        assert mean_BCHW[:, 0].std() < 1e-12
        assert (mean_BCHW[:, 1] / mean_BCHW[:, 0] + 2).abs().max() < 1e-9
    with torch.no_grad():
        # halfway between a row of cells and the next one is their mean
        network.map.bias.copy_(torch.tensor([1.0, 1, 1, 2, 2, 2, 3, 3, 3] + [0.0] * 27))
    mean_HW = network(make_conditions(), (2, 5, 3))[0][0, 0]
    assert (mean_HW[:, 0] / mean_HW[0, 0]).tolist() == pytest.approx([1.0, 1.4, 2.0, 2.6, 3.0])


def test_a_text_without_a_pooled_embedding_is_the_mean_of_its_own_tokens() -> None:
    embeds_BLC = torch.arange(24.0).view(2, 3, 4).square()
    embeds_BLC[0, 2] = math.nan
    conditions = Conditions(embeds_BLC, torch.zeros(2, 0), lengths_B=torch.tensor([2, 3], dtype=torch.int32))
    expected = [embeds_BLC[0, :2].double().mean(dim=0), embeds_BLC[1].double().mean(dim=0)]
    for found_F, mean_F in zip(features(conditions), expected, strict=True):
        torch.testing.assert_close(found_F, (mean_F - mean_F.mean()) / (mean_F.var(correction=0) + 1e-5).sqrt())
    pooled = replace(conditions, pooled_BC=embeds_BLC[:, 0])
    torch.testing.assert_close(features(pooled), torch.nn.functional.layer_norm(embeds_BLC[:, 0].double(), (4,)))


def test_what_was_saved_is_loaded_and_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    network = make_network(0.5)
    save_proposal(network, tmp_path / "proposal")
    loaded = load_proposal(tmp_path / "proposal")
    assert loaded.shape == SHAPE
    for found, own in zip(loaded(make_conditions(), LATENT), network(make_conditions(), LATENT), strict=True):
        assert torch.equal(found, own)
    loaded.check_fits(LATENT, make_conditions(), "it")
    with pytest.raises(ValueError, match="it is a proposal for 2 latent channels, and this model has 3; use proposal="):
        loaded.check_fits((3, 3, 3), make_conditions(), "it")
    with pytest.raises(ValueError, match="it is a proposal for 5 elements of a text, and this model has 6"):
        loaded.check_fits(LATENT, make_conditions(width=6), "it")
    with pytest.raises(ValueError, match="holds no learned proposal"):
        load_proposal(tmp_path)
    (tmp_path / "proposal" / "config.json").write_text('{"channels": 2}')
    with pytest.raises(ValueError, match="holds no learned proposal"):
        load_proposal(tmp_path / "proposal")
