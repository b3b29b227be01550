"""Full fine-tuning, sharded: what 4 ranks saved goes on by 1, by 2, by 4 again, as if 1 rank had never stopped."""

from pathlib import Path

import torch
from torch import Tensor

from fastgrpo.checkpoints.checkpoint import Checkpoint
from fastgrpo.commands.trained import load_model, with_run
from fastgrpo.config import load_config
from fastgrpo.distributed.world import World
from fastgrpo.rewards.ranks import PolicyRank
from fastgrpo.train import build_trainer
from tests.ranks import on_ranks
from tests.tiny_config import make_overrides

SETTINGS = ("adaptation=full", "model.dtype=float64", "model.decode_dtype=float64", "checkpoint.every=1")
LORA = ("adaptation.rank=4", "adaptation.alpha=6.0")
NUM_ITERATIONS = 4


def run_to(world: World, weights: Path, output: Path, num_iterations: int) -> None:
    """Go on to that iteration from where the run in ``output`` stands."""
    overrides = [word for word in make_overrides(weights, output, *SETTINGS) if word not in LORA]
    config = load_config("train", [*overrides, f"train.iterations={num_iterations}", "resume=true"])
    trainer = build_trainer(config, PolicyRank(world=world))
    trainer.resume()
    trainer.run()


def final_tensors(output: Path) -> dict[str, Tensor]:
    state = Checkpoint(output / "checkpoints", every=1, keep=1).load(output / f"checkpoints/step_{NUM_ITERATIONS:06d}")
    moments = {
        f"moment/{i}/{name}": value for i, values in state.optimizer["state"].items() for name, value in values.items()
    }
    return state.weights | {f"ema/{name}": average for name, average in state.ema.items()} | moments


def test_saved_by_4_ranks_resumed_by_1_and_2_and_4(tiny_weights: Path, tmp_path: Path) -> None:
    on_ranks(1, run_to, tiny_weights, tmp_path / "alone", NUM_ITERATIONS)
    for iteration, num_ranks in enumerate((4, 1, 2, 4), 1):
        on_ranks(num_ranks, run_to, tiny_weights, tmp_path / "run", iteration)
    expected, found = final_tensors(tmp_path / "alone"), final_tensors(tmp_path / "run")
    assert len(list((tmp_path / f"run/checkpoints/step_{NUM_ITERATIONS:06d}").glob("weights_of_rank_*"))) == 4
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-8, atol=1e-10, msg=name)

    # a command reads the averages that 4 ranks wrote, without any ranks
    overrides = [f"run={tmp_path / 'run'}", "prompt=a red circle"]
    model, source = load_model(with_run(load_config("sample", overrides), overrides))
    assert "averaged weights of" in source
    for name, weight in model.trainable.items():
        assert torch.equal(weight, found[f"ema/{name}"])
