"""The average of the weights, and that the weights themselves come back."""

import pytest
import torch
from torch import nn

from fastgrpo.ema import EMA


def make_weights() -> dict[str, nn.Parameter]:
    return {"a": nn.Parameter(torch.tensor([1.0, 2.0])), "b": nn.Parameter(torch.tensor([[3.0]]))}


def move(weights: dict[str, nn.Parameter], value: float) -> None:
    with torch.no_grad():
        for weight in weights.values():
            weight.fill_(value)


def test_the_decay_is_ramped_up_and_then_constant() -> None:
    weights = make_weights()
    ema = EMA(weights, decay=0.25)
    move(weights, 11.0)
    ema.update()
    # 2 / 11 of the old value remains after the first update, then 3 / 12 and from there on never more than the decay
    torch.testing.assert_close(ema.averages["a"], torch.tensor([1.0, 2.0]) * 2 / 11 + 11.0 * 9 / 11)
    before = ema.averages["b"].clone()
    ema.update()
    torch.testing.assert_close(ema.averages["b"], before * 0.25 + 11.0 * 0.75)
    before = ema.averages["b"].clone()
    ema.update()
    torch.testing.assert_close(ema.averages["b"], before * 0.25 + 11.0 * 0.75)


def test_with_a_share_the_window_grows_with_the_run() -> None:
    weights = make_weights()
    ema = EMA(weights, decay=0.25, share=0.25)
    kept = []
    for _ in range(20):
        move(weights, 0.0)
        for average in ema.averages.values():
            average.fill_(1.0)
        ema.update()
        kept.append(ema.averages["a"][0].item())
    # ramped up, then the decay, until a quarter of the updates so far is more than 1 / (1 - .25) of them
    assert kept[:5] == pytest.approx([2 / 11, 0.25, 0.25, 0.25, 0.25])
    assert kept[5:] == pytest.approx([max(0.25, 1 - 1 / (n / 4)) for n in range(6, 21)])
    assert kept[19] == pytest.approx(1 - 1 / 5)


def test_averages_are_applied_inside_and_weights_restored_bit_for_bit() -> None:
    weights = make_weights()
    ema = EMA(weights, decay=0.9)
    move(weights, 0.1)
    ema.update()
    with ema.applied():
        assert all(torch.equal(weights[name], average) for name, average in ema.averages.items())
        assert not torch.equal(weights["a"], torch.full((2,), 0.1))
    assert torch.equal(weights["a"], torch.full((2,), 0.1))
    assert torch.equal(weights["b"], torch.full((1, 1), 0.1))


def test_weights_are_restored_after_an_error() -> None:
    weights = make_weights()
    ema = EMA(weights, decay=0.9)
    move(weights, 5.0)

    def fail() -> None:
        with ema.applied():
            raise KeyError("inside")

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(weights["a"], torch.full((2,), 5.0))


def test_a_loaded_average_goes_on_as_the_saved_one() -> None:
    weights = make_weights()
    ema = EMA(weights, decay=0.9)
    move(weights, 7.0)
    for _ in range(3):
        ema.update()
    loaded = EMA(make_weights(), decay=0.9)
    loaded.load({name: average.clone() for name, average in ema.averages.items()}, ema.num_updates)
    loaded._weights = weights
    move(weights, -2.0)
    ema.update()
    loaded.update()
    assert all(torch.equal(loaded.averages[name], average) for name, average in ema.averages.items())


def test_no_decay_keeps_the_weights_themselves() -> None:
    weights = make_weights()
    ema = EMA(weights, decay=0.0)
    move(weights, 0.3)
    ema.update()
    assert torch.equal(ema.averages["a"], weights["a"])


def test_no_decay_keeps_the_weights_themselves_whatever_the_share() -> None:
    weights = make_weights()
    ema = EMA(weights, decay=0.0, share=0.5)
    for value in range(20):
        move(weights, float(value))
        ema.update()
    assert torch.equal(ema.averages["a"], weights["a"])


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_a_decay_outside_its_range_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=r"train\.ema_decay must be in \[0, 1\)"):
        EMA(make_weights(), decay)
