"""A run is what its record says: what a resumption changes, keeps, tells, and leaves alone."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from omegaconf import OmegaConf
from torch import Tensor

from fastgrpo import cli
from fastgrpo.records.json_lines import read_rows
from fastgrpo.training import train
from tests.tiny_config import make_config, make_overrides


def config_of(output: Path) -> Any:
    return OmegaConf.to_container(OmegaConf.load(output / "config.yaml"))


def test_the_config_keeps_its_history_and_the_user_is_told(
    tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    train(make_config(tiny_weights, output, "train.iterations=1", "train.weight_decay=0.25"))
    begun = config_of(output)
    assert "history" not in begun
    capsys.readouterr()
    # the line of someone who has forgotten all but where the run is
    words = ["train", f"output={output}", "resume=true"]
    assert cli.main([*words, "train.iterations=2", "train.learning_rate=1e-5"]) == 0
    shown = capsys.readouterr().out
    assert "from iteration 2 on: train.iterations 1 -> 2\n" in shown
    assert "from iteration 2 on: train.learning_rate 0.001 -> 1e-05\n" in shown
    assert cli.main([*words, "train.iterations=3"]) == 0
    kept = config_of(output)
    assert kept.pop("history") == [
        {"after_iteration": 1, "changed": {"train.iterations": [1, 2], "train.learning_rate": [1e-3, 1e-5]}},
        {"after_iteration": 2, "changed": {"train.iterations": [2, 3]}},
    ]
    begun["train"] |= {"iterations": 3, "learning_rate": 1e-5}
    assert kept == begun
    assert [row["iteration"] for row in read_rows(output / "metrics.jsonl")] == [0, 1, 2, 3]


def test_a_finished_run_says_so_and_keeps_its_config_to_the_byte(
    tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = train(make_config(tiny_weights, tmp_path / "run", "train.iterations=1"))
    before = (output / "config.yaml").read_bytes()
    capsys.readouterr()
    assert cli.main(["train", f"output={output}", "resume=true"]) == 0
    assert f"the run in {output} is at its end, after 1 iterations; raise train.iterations" in capsys.readouterr().out
    assert (output / "config.yaml").read_bytes() == before


@pytest.mark.parametrize("word", ["train.group_size=4", "seed=7", "algorithm=smart_grpo", "reward=shapes"])
def test_another_run_in_the_same_directory_is_refused_before_anything_is_written(
    word: str, tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = train(make_config(tiny_weights, tmp_path / "run", "train.iterations=1"))
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    assert cli.main(["train", f"output={output}", "resume=true", "train.iterations=2", word]) == 2
    error = capsys.readouterr().err
    assert f"the run in {output} was begun otherwise: {word.split('=')[0].split('.')[0]}" in error
    assert f"fastgrpo export run={output} output=EXPORT merged=true" in error
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()} == before


_PRESS_AT: list[int] = []


def pressing(images_BCHW: Tensor, prompts: list[str]) -> Tensor:
    """A reward during which somebody presses Ctrl-C, in the calls that are counted down to."""
    if _PRESS_AT:
        _PRESS_AT[0] -= 1
        if _PRESS_AT[0] == 0:
            os.kill(os.getpid(), signal.SIGINT)
    return images_BCHW.mean(dim=(1, 2, 3))


def test_an_interrupted_run_ends_its_iteration_and_says_how_to_go_on(
    tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "a run"
    settings = ("reward=custom", "reward.path=tests.checkpoints.test_same_run.pressing", "reward.golden=false")
    words = make_overrides(tiny_weights, output, *settings, "train.iterations=9", "checkpoint.every=100")
    # the first evaluation, and an iteration, of which each is one call; then in the second iteration
    _PRESS_AT[:] = [3]
    try:
        assert cli.main(["train", *words]) == 130
    finally:
        _PRESS_AT.clear()
    shown = capsys.readouterr()
    assert "stopping after this iteration, which will be saved" in shown.err
    assert "stopped by signal 2 after iteration 2, which is saved" in shown.err
    # the reward is code of the user's own: it is named again
    assert f"go on with: fastgrpo train 'output={output}' resume=true {settings[1]}\n" in shown.out
    assert (output / "checkpoints/step_000002").is_dir()
    assert (output / "summary.json").is_file()
    assert (output / "curves.png").is_file()
    lora = safetensors.torch.load_file(output / "lora/pytorch_lora_weights.safetensors")
    assert any(torch.count_nonzero(weight) for name, weight in lora.items() if "lora_B" in name)
    assert cli.main(["train", f"output={output}", "resume=true", "train.iterations=3", settings[1]]) == 0
    assert [row["iteration"] for row in read_rows(output / "metrics.jsonl")] == [0, 1, 2, 3]
