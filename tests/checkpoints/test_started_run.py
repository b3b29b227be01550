"""A run that starts from a LoRA: it reads the file once, and goes on, samples and exports without it."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from fastgrpo import cli
from fastgrpo.assembly import build_trainer
from fastgrpo.checkpoints.checkpoint import Checkpoint
from fastgrpo.checkpoints.same_run import SameRun
from fastgrpo.distributed.world import World
from fastgrpo.files.run_directory import RunDirectory
from fastgrpo.models.adapter import Started
from fastgrpo.settings import Runtime
from fastgrpo.training import train
from tests.tiny_config import make_config, make_overrides

FILE = "lora/pytorch_lora_weights.safetensors"
# what the first run has, and not what the config of the second says
FIRST = ("adaptation.rank=3", "adaptation.alpha=3.0", "+adaptation.targets=[to_q,to_v]", "train.learning_rate=0.05")


@pytest.fixture(scope="module")
def lora(tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("first") / "run"
    return train(make_config(tiny_weights, output, *FIRST)) / "lora"


def words_of(weights: Path, output: Path, lora: Path, *words: str) -> list[str]:
    return ["train", *make_overrides(weights, output, f"adaptation.start={lora}", "checkpoint.every=1", *words)]


def test_it_goes_on_without_the_file_as_if_undisturbed(
    tiny_weights: Path, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, broken, copy = tmp_path / "whole", tmp_path / "broken", tmp_path / "copy"
    assert cli.main(words_of(tiny_weights, whole, lora)) == 0
    said = f"training starts from adaptation.start={lora}: its rank 3 and its layers take the place of adaptation.rank"
    assert f"{said} and targets, and alpha / rank stays 1.5" in capsys.readouterr().out
    shutil.copytree(lora, copy)
    assert cli.main(words_of(tiny_weights, broken, copy, "train.iterations=1")) == 0
    shutil.rmtree(copy)
    begun: Any = OmegaConf.load(broken / "config.yaml").adaptation
    assert (begun.start, begun.rank, begun.alpha, list(begun.targets)) == (str(copy), 3, 4.5, ["to_q", "to_v"])
    capsys.readouterr()
    # the same line once more, with its group, whose rank is the config's
    words = words_of(tiny_weights, broken, copy, "adaptation=lora", "resume=true", "train.iterations=2")
    assert cli.main(words) == 0
    assert "training starts from" not in capsys.readouterr().out
    ours, theirs = load_file(broken / FILE), load_file(whole / FILE)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    # and what reads a run
    for command in (["sample", "prompt=a", "num_steps=2", "images_per_prompt=1"], ["export"]):
        name = command[0]
        line = [*command, f"run={broken}", f"output={tmp_path / name}", "runtime.device=cpu", "runtime.threads=1"]
        assert cli.main(line) == 0
    exported = load_file(tmp_path / "export" / FILE)
    assert all(torch.equal(ours[name], exported[name]) for name in ours)


def test_another_scale_is_another_run(
    tiny_weights: Path, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words_of(tiny_weights, tmp_path / "run", lora, "train.iterations=1")) == 0
    words = ["train", f"output={tmp_path / 'run'}", "resume=true", "train.iterations=2"]
    assert cli.main([*words, "adaptation.alpha=9.0"]) == 2
    assert "adaptation.alpha was 4.5 and would be 9.0" in capsys.readouterr().err
    assert cli.main([*words, f"adaptation.start={lora.parent}"]) == 2
    assert f"adaptation.start was {lora} and would be {lora.parent}" in capsys.readouterr().err
    assert cli.main(words) == 0


def test_policy_old_policy_and_average_start_as_the_lora(tiny_weights: Path, lora: Path, tmp_path: Path) -> None:
    trainer = build_trainer(make_config(tiny_weights, tmp_path / "run", f"adaptation.start={lora}"))
    state = trainer.state()
    for name, factor in load_file(lora.parent / FILE).items():
        # its scale is in B
        scale = 1.0 if "lora_A" in name else 1 / 1.5
        for weights in (trainer.model.trainable, state.ema):
            torch.testing.assert_close(weights[name.removeprefix("transformer.")].detach(), scale * factor)
    # the old policy is the policy itself
    assert not state.old


def test_a_run_without_a_checkpoint_reads_it_again(
    tiny_weights: Path, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    shutil.copytree(lora, tmp_path / "lora")
    words = words_of(tiny_weights, output, tmp_path / "lora", "train.iterations=1")
    assert cli.main(words) == 0
    first = load_file(output / FILE)
    config = (output / "config.yaml").read_bytes()
    shutil.rmtree(output / "checkpoints")
    assert cli.main(["train", f"output={output}", "resume=true"]) == 0
    again = load_file(output / FILE)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert (output / "config.yaml").read_bytes() == config
    shutil.rmtree(output / "checkpoints")
    shutil.rmtree(tmp_path / "lora")
    assert cli.main(["train", f"output={output}", "resume=true"]) == 2
    assert f"adaptation.start={tmp_path / 'lora'} is not here" in capsys.readouterr().err


def test_a_checkpoint_of_a_run_begun_so_is_known_by_its_rank_and_layers(
    tiny_weights: Path, lora: Path, tmp_path: Path
) -> None:
    train(make_config(tiny_weights, tmp_path / "run", f"adaptation.start={lora}", "train.iterations=1"))
    checkpoint = Checkpoint(tmp_path / "run" / "checkpoints", every=1, keep=1)
    path = checkpoint.latest()
    assert path is not None
    assert "LoRA(rank=3, alpha=4.5, targets=('to_q', 'to_v'), seed=42)" in checkpoint.load(path).model


def test_ranks_that_start_from_unlike_files_are_refused(tiny_weights: Path, tmp_path: Path) -> None:
    class TwoRanks(World):
        """The other one read another file."""

        def everyones(self, value: Any, what: str) -> list[Any]:
            return [value, value | {"start": "other"}] if isinstance(value, dict) else [value, value]

    run = SameRun(
        directory=RunDirectory(tmp_path), config={"adaptation": {}, "runtime": {}}, world=TwoRanks(), is_resumed=False
    )
    model: Any = SimpleNamespace(fingerprint="same", started=Started({"rank": 2}, "this"))
    with pytest.raises(ValueError, match="rank 1 has another start than rank 0; give all ranks the same"):
        run.agree(Runtime(**make_config(tiny_weights, tmp_path / "run").runtime), model)
    assert run.config["adaptation"] == {"rank": 2}
