"""Full fine-tuning, sharded: what some ranks saved goes on by another number of them, as if one had never stopped."""

from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor

from fastgrpo.assembly import build_trainer
from fastgrpo.checkpoints.checkpoint import Checkpoint
from fastgrpo.commands.trained import load_model, with_run
from fastgrpo.config import load_config
from fastgrpo.distributed.world import World
from fastgrpo.records.record import NoRecord
from fastgrpo.rewards.ranks import PolicyRank
from tests.ranks import Ranks, ranks_of_module
from tests.tiny_config import make_overrides

SETTINGS = ("adaptation=full", "model.dtype=float64", "model.decode_dtype=float64", "checkpoint.every=1")
LORA = ("adaptation.rank=4", "adaptation.alpha=6.0")

on_ranks = ranks_of_module()


def run_to(world: World, config: DictConfig, output: Path, num_iterations: int) -> None:
    """Go on to that iteration from where the run in ``output`` stands."""
    config.output, config.train.iterations = str(output), num_iterations
    trainer = build_trainer(config, PolicyRank(world=world))
    # curves and pictures take longer than training
    trainer.record = NoRecord()
    trainer.resume()
    trainer.run()


def final_tensors(output: Path) -> dict[str, Tensor]:
    path = max((output / "checkpoints").iterdir())
    state = Checkpoint(output / "checkpoints", every=1, keep=1).load(path)
    moments = {
        f"moment/{i}/{name}": value for i, values in state.optimizer["state"].items() for name, value in values.items()
    }
    return state.weights | {f"ema/{name}": average for name, average in state.ema.items()} | moments


@pytest.mark.parametrize("worlds", [(1, 2), pytest.param((4, 1, 2, 4), marks=pytest.mark.slow)], ids=str)
def test_saved_by_some_ranks_and_resumed_by_others(
    worlds: tuple[int, ...], tiny_weights: Path, tmp_path: Path, on_ranks: Ranks
) -> None:
    words = [word for word in make_overrides(tiny_weights, tmp_path / "run", *SETTINGS) if word not in LORA]
    config = load_config("train", [*words, "resume=true"])
    run_to(World(), config, tmp_path / "alone", len(worlds))
    for iteration, num_ranks in enumerate(worlds, 1):
        if num_ranks == 1:
            run_to(World(), config, tmp_path / "run", iteration)
        else:
            on_ranks(num_ranks, run_to, config, tmp_path / "run", iteration)
    expected, found = final_tensors(tmp_path / "alone"), final_tensors(tmp_path / "run")
    last = tmp_path / f"run/checkpoints/step_{len(worlds):06d}"
    assert len(list(last.glob("weights_of_rank_*"))) == worlds[-1]
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-8, atol=1e-10, msg=name)

    # a command reads the averages that several ranks wrote, without any ranks
    overrides = [f"run={tmp_path / 'run'}", "prompt=a red circle"]
    model, source = load_model(with_run(load_config("sample", overrides), overrides))
    assert "averaged weights of" in source
    for name, weight in model.trainable.items():
        assert torch.equal(weight, found[f"ema/{name}"])
