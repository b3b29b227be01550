"""Live bytes are those that one can count by hand, with real tensors and with fake ones."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastgrpo.memory.byte_count import LiveBytes, WithoutData

B, D, H = 8, 16, 64
FLOAT = 4


def peak_of(run: Callable[[], object]) -> int:
    with LiveBytes() as counter:
        run()
    return counter.peak


def make_mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, D))


def test_an_mlp_keeps_what_its_backward_needs() -> None:
    mlp, x_BD = make_mlp(), torch.zeros(B, D)
    with LiveBytes() as counter:
        y_BD = mlp(x_BD)
        # gelu needs its input, the second layer its own for the gradient of its weight; x was there before
        assert counter.live == FLOAT * (B * H + B * H + B * D)
        y_BD.sum().backward()
        del y_BD
        assert counter.live == FLOAT * sum(p.numel() for p in mlp.parameters())
    assert counter.live == FLOAT * sum(p.numel() for p in mlp.parameters())


def test_behind_a_frozen_layer_less_is_kept() -> None:
    mlp, x_BD = make_mlp(), torch.zeros(B, D)
    mlp[2].requires_grad_(False)
    with LiveBytes() as counter:
        y_BD = mlp(x_BD)
        assert counter.live == FLOAT * (B * H + B * D)
    assert y_BD.requires_grad


def test_checkpointing_keeps_the_output_alone_and_pays_for_the_inside_in_the_backward_pass() -> None:
    mlp, x_BD = make_mlp(), torch.zeros(B, D, requires_grad=True)
    with LiveBytes() as counter:
        y_BD = checkpoint(mlp, x_BD, use_reentrant=False)
        assert counter.live == FLOAT * B * D
        before = counter.peak
        y_BD.sum().backward()
        assert counter.peak >= FLOAT * (2 * B * H + B * D)
    assert before == FLOAT * (2 * B * H), "forward: a hidden layer before and after its gelu, then the latter and y"


def test_a_peak_is_of_what_is_alive_at_once() -> None:
    def chain(x: Tensor) -> None:
        a = x * 2
        b = a + 1
        del a
        (b * 3).sum()

    x = torch.zeros(1000)
    # b and b * 3, then the sum beside b * 3 as well
    assert peak_of(lambda: chain(x)) == FLOAT * 2001


def test_views_and_results_in_place_are_not_counted_twice() -> None:
    x = torch.zeros(10, 10)
    with LiveBytes() as counter:
        x.add_(1).view(100)[:50].t()
        assert counter.live == 0
        y = torch.empty(10)
        kept = y.view(2, 5)[0]
        del y
        assert counter.live == 10 * FLOAT, "a view keeps all of its storage"
        del kept
        assert counter.live == 0
    assert counter.peak == 10 * FLOAT


@pytest.mark.parametrize("checkpointed", [False, True])
def test_fake_tensors_are_counted_as_real_ones(checkpointed: bool) -> None:
    def train(mlp: Callable[[Tensor], Tensor], x_BD: Tensor) -> Callable[[], None]:
        def run() -> None:
            y_BD = checkpoint(mlp, x_BD, use_reentrant=False) if checkpointed else mlp(x_BD)
            y_BD.square().mean().backward()

        return run

    real = peak_of(train(make_mlp(), torch.zeros(B, D, requires_grad=True)))
    with WithoutData():
        fake = peak_of(train(make_mlp(), torch.zeros(B, D, requires_grad=True)))
    assert fake == real > FLOAT * 2 * B * H
