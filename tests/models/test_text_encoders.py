"""Text encoders come to the device as a copy that is dropped, and not at all while a run trains."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fastgrpo.distributed.world import World
from fastgrpo.models.text_encoders import TextEncoders
from fastgrpo.prompts import PromptSource
from fastgrpo.trainer import Trainer
from fastgrpo.training import _encode_ahead, _texts_to_come, train
from fastgrpo.types import Conditions, Prompt
from tests.ranks import Ranks, ranks_of_module
from tests.tiny_config import make_config

on_ranks = ranks_of_module()


def make_encoders(device: str) -> tuple[TextEncoders, nn.Linear]:
    linear = nn.Linear(2, 3, dtype=torch.float64)

    def run(text: str) -> Conditions:
        x_BLC = torch.full((1, 1, 2), float(len(text)), dtype=torch.float64, device=device)
        return Conditions(linear(x_BLC), linear(x_BLC)[:, 0])

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
    source = PromptSource([Prompt(text) for text in texts], 3, seed=0)
    parts: Any = SimpleNamespace(prompts=source.prompts, held_out=[Prompt("kept"), Prompt(texts[0])])

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
    monkeypatch.setattr("fastgrpo.training._MOST_AHEAD", 4)
    assert to_come(1000) == to_come(2)[:4]


class OnDisk:
    """A model that keeps the conditions of a text as an empty file."""

    has_two_branches = False

    def __init__(self, directory: Path) -> None:
        self.directory, self.encoded = directory, 0

    def check_texts(self, texts: Iterable[str]) -> None: ...

    def encode_ahead(self, texts: Sequence[str], *, is_shown: bool) -> int:
        absent = [text for text in texts if not (self.directory / text).exists()]
        for text in absent:
            (self.directory / text).touch()
        self.encoded += len(absent)
        return len(absent)


def encoded_by(world: World, directories: list[Path], texts: list[str]) -> tuple[int, int]:
    """What a rank encoded, and what its disk has in the end."""
    model = OnDisk(directories[world.rank])
    source = PromptSource([Prompt(text) for text in texts], len(texts), seed=0)
    trainer: Any = SimpleNamespace(model=model, world=world, prompts=source, num_iterations=1)
    parts: Any = SimpleNamespace(prompts=source.prompts, held_out=[])
    with pytest.MonkeyPatch.context() as patch:
        # a rank a node where each has a disk of its own
        is_shared = len(set(directories)) == 1
        patch.setenv("LOCAL_RANK", str(world.rank if is_shared else 0))
        patch.setenv("LOCAL_WORLD_SIZE", str(world.size if is_shared else 1))
        _encode_ahead(parts, trainer)
    return model.encoded, len(list(model.directory.iterdir()))


def test_ranks_share_the_texts_and_each_disk_has_all_of_them_in_the_end(on_ranks: Ranks, tmp_path: Path) -> None:
    texts = [f"prompt {number}" for number in range(7)]
    shared, first, second = (tmp_path / name for name in ("shared", "first", "second"))
    for directory in (shared, first, second):
        directory.mkdir()
    assert on_ranks(2, encoded_by, [shared, shared], texts) == [(4, 7), (3, 7)]
    assert on_ranks(2, encoded_by, [first, second], texts) == [(7, 7), (7, 7)]
