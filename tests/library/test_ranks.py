"""A program that torchrun starts: every rank calls ``fastgrpo.train`` with its own function and lists."""

import math
from pathlib import Path

from torch import Tensor

import fastgrpo
from fastgrpo.distributed.world import World
from tests.library.runs import brightness, rows, words
from tests.ranks import Ranks, ranks_of_module

TEXTS = ["a red circle", "two blue squares", "a green triangle"]
FLOAT64 = ("model.dtype=float64", "model.decode_dtype=float64")
# ``train`` itself joins
on_ranks = ranks_of_module(joined=False)


def train_twice(_: World, settings: list[str], outputs: list[Path]) -> list[str]:
    def reward(images_BCHW: Tensor, prompts: list[str]) -> Tensor:
        return brightness(images_BCHW, prompts)

    runs = [
        fastgrpo.train(*settings, f"output={output}", reward=reward, prompts=TEXTS, held_out=TEXTS[:1])
        for output in outputs
    ]
    return [str(run.path) for run in runs]


def test_two_ranks_train_as_one_process_does_and_again(tiny_weights: Path, tmp_path: Path, on_ranks: Ranks) -> None:
    settings = words(tiny_weights, tmp_path / "run", *FLOAT64, with_reward=False, with_prompts=False)
    outputs = [tmp_path / "first", tmp_path / "second"]
    found = on_ranks(2, train_twice, settings, outputs)
    assert found == [[str(output) for output in outputs]] * 2
    train_twice(World(), settings, [tmp_path / "alone"])
    alone = rows(tmp_path / "alone")
    for output in outputs:
        assert (output / "prompts.jsonl").read_bytes() == (tmp_path / "alone/prompts.jsonl").read_bytes()
        assert len(rows(output)) == len(alone)
        for row, expected in zip(rows(output), alone, strict=True):
            for key in ("reward/total", "eval/custom", "loss", "grad_norm"):
                assert math.isclose(float(row.get(key, 0)), float(expected.get(key, 0)), rel_tol=1e-6, abs_tol=1e-9), (
                    key
                )
