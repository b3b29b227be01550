"""Text encoders come to the device as a copy that is dropped, and not at all while a run trains."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastgrpo.models.text_encoders import TextEncoders
from fastgrpo.prompts import PromptSource
from fastgrpo.train import _texts_to_come, train
from fastgrpo.trainer import Trainer
from tests.tiny_config import make_config


def make_encoders(device: str) -> tuple[TextEncoders, nn.Linear]:
    linear = nn.Linear(2, 3, dtype=torch.float64)

    def run(text: str) -> tuple[Tensor, Tensor]:
        x_BLC = torch.full((1, 1, 2), float(len(text)), dtype=torch.float64, device=device)
        return linear(x_BLC), linear(x_BLC)[:, 0]

    return TextEncoders(lambda: [linear], run, torch.device(device)), linear


def test_what_was_on_the_device_is_dropped_and_the_host_keeps_the_very_weights() -> None:
    encoders, linear = make_encoders("cpu")
    pointers = [weight.data_ptr() for weight in linear.parameters()]
    (row,) = encoders(["four"])
    assert torch.allclose(row.pooled_BC, linear(torch.full((1, 2), 4.0, dtype=torch.float64)))
    assert [weight.data_ptr() for weight in linear.parameters()] == pointers


@pytest.mark.gpu
def test_on_a_gpu_weights_go_there_and_nothing_comes_back() -> None:
    encoders, linear = make_encoders("cuda")
    pointers = [weight.data_ptr() for weight in linear.parameters()]
    # a first product leaves the workspace of its library
    list(encoders([""]))
    before = torch.cuda.memory_allocated()
    rows = iter(encoders(["four"]))
    row = next(rows)
    assert linear.weight.is_cuda
    assert list(rows) == []
    assert row.pooled_BC.is_cuda
    assert [weight.data_ptr() for weight in linear.parameters()] == pointers
    del row
    assert torch.cuda.memory_allocated() == before


def test_a_run_encodes_all_its_prompts_before_it_begins_and_a_second_one_none(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Any] = []
    run, step = TextEncoders.__call__, Trainer.step

    def encode_spy(self: TextEncoders, texts: Sequence[str]) -> Any:
        events.append(sorted(texts))
        return run(self, texts)

    def step_spy(self: Trainer) -> dict[str, float]:
        events.append("step")
        return step(self)

    monkeypatch.setattr(TextEncoders, "__call__", encode_spy)
    monkeypatch.setattr(Trainer, "step", step_spy)
    overrides = (
        f"model.condition_cache={tmp_path / 'conditions'}",
        "model.guidance_scale=4.5",
        "train.iterations=2",
        "evaluate.every=2",
    )
    config = make_config(tiny_weights, tmp_path / "run", *overrides)
    train(config)
    texts = Path(config.prompts.path).read_text().splitlines() + Path(config.prompts.held_out).read_text().splitlines()
    assert events == [sorted({"", *texts}), "step", "step"]
    events.clear()
    train(make_config(tiny_weights, tmp_path / "again", *overrides))
    assert events == ["step", "step"]


def test_texts_come_in_the_order_of_the_run_and_no_more_than_it_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"prompt {number}" for number in range(10)]
    parts: Any = SimpleNamespace(
        texts=texts, held_out=["kept", texts[0]], training=SimpleNamespace(prompts_per_iteration=3)
    )
    source = PromptSource(texts, 3, seed=0)

    def to_come(num_iterations: int, *, two_branches: bool = False) -> list[str]:
        trainer: Any = SimpleNamespace(
            model=SimpleNamespace(has_two_branches=two_branches), prompts=source, num_iterations=num_iterations
        )
        return _texts_to_come(parts, trainer)

    met = [text for iteration in range(2) for text in source.at(iteration).texts]
    assert to_come(2) == list(dict.fromkeys(["kept", texts[0], *met]))
    assert to_come(2, two_branches=True)[0] == ""
    # of a thousand iterations those of an epoch
    assert set(to_come(1000)) == {"kept", *texts}
    monkeypatch.setattr("fastgrpo.train._MOST_AHEAD", 4)
    assert to_come(1000) == to_come(2)[:4]
