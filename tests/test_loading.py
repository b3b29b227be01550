"""What makes modules waits while another thread loads a model, which is when modules have no weights."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from torch import nn

from fastgrpo.loading import one_at_a_time
from fastgrpo.models.text_encoders import TextEncoders
from fastgrpo.parts import RunParts
from fastgrpo.proposal.network import ProposalNetwork, ProposalShape
from tests.tiny_config import make_config


def in_encoders(_: RunParts) -> Iterator[nn.Module]:
    made: list[nn.Module] = []

    def load() -> list[nn.Module]:
        made.append(nn.Linear(2, 3))
        return made

    TextEncoders(load, lambda text: pytest.fail(text), torch.device("cpu")).make()
    yield from made


def in_proposal(_: RunParts) -> Iterator[nn.Module]:
    yield ProposalNetwork(ProposalShape(channels=1, text_width=2, width=3, cells=2, learns_std=True, max_kl=1.0))


def in_model(parts: RunParts) -> Iterator[nn.Module]:
    yield parts.model().transformer  # type: ignore[attr-defined]


def in_rewards(parts: RunParts) -> Iterator[nn.Module]:
    made: list[nn.Module] = []

    def make() -> Any:
        made.append(nn.Linear(2, 3))
        return parts.rewards.make()

    replace(parts.rewards, make=make).load(["a red circle"], "cpu")
    yield from made


@pytest.mark.parametrize("make", [in_encoders, in_proposal, in_model, in_rewards])
def test_modules_have_weights_whatever_another_thread_loads(
    make: Callable[[RunParts], Iterator[nn.Module]], tiny_weights: Path, tmp_path: Path
) -> None:
    parts = RunParts.read(make_config(tiny_weights, tmp_path))
    made: list[nn.Module] = []
    thread = Thread(target=lambda: made.extend(make(parts)))
    # as diffusers does while it reads weights, for all threads
    with one_at_a_time, init_empty_weights():
        thread.start()
        thread.join(0.5)
        assert thread.is_alive()
        assert not made
    thread.join()
    assert [weight.device.type for module in made for weight in module.parameters()].count("cpu") >= 2
    assert not any(weight.is_meta for module in made for weight in module.parameters())
