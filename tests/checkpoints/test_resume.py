"""A run that is killed goes on from its last checkpoint and ends, bit for bit, as an undisturbed one."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from pkgutil import resolve_name
from typing import Any
from unittest import mock

import pytest
import safetensors.torch
from omegaconf import DictConfig

from fastgrpo.cli import PREEMPTED, main
from fastgrpo.config import load_config
from fastgrpo.distributed.world import World
from fastgrpo.records.json_lines import read_rows
from fastgrpo.trainer import Trainer
from fastgrpo.training import train
from tests.checkpoints import resume_child
from tests.ranks import Ranks, ranks_of_module
from tests.tiny_config import make_config, make_overrides

SETTINGS = (
    "train.learning_rate=1e-2",
    "train.optimizer_steps=2",
    "checkpoint.every=2",
    "evaluate.every=5",
    "algorithm=smart_grpo",
    "algorithm/noise=elite",
    "algorithm/timesteps=all_but_last",
    "algorithm.schedule.num_steps=4",
    "algorithm.noise.candidates=4",
    "algorithm.noise.elites=3",
    "algorithm.noise.estimate_steps=2",
)
SHORT = (*SETTINGS, "train.iterations=6")
LONG = (*SETTINGS, "train.iterations=12")

on_ranks = ranks_of_module(joined=False)


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing them takes longer than training."""
    monkeypatch.setattr("fastgrpo.records.metrics.draw_curves", lambda rows, path, title: None)


def lasting_metrics(output: Path) -> list[dict]:
    """Everything measured but time and memory."""
    varying = ("seconds", "images_per_second", "peak_bytes")
    return [
        {key: value for key, value in row.items() if not key.startswith(varying)}
        for row in read_rows(output / "metrics.jsonl")
    ]


def final_state(output: Path) -> dict[str, bytes]:
    """All that was learned, bit for bit: weights, averages, optimizer and the exported adapters."""
    last = max((output / "checkpoints").iterdir())
    state = {path.name: path.read_bytes() for path in last.glob("*.safetensors")}
    assert state.keys() >= {"weights.safetensors", "ema.safetensors", "optimizer.safetensors"}
    # the order of a file's metadata differs from process to process, its tensors do not
    lora = safetensors.torch.load_file(output / "lora/pytorch_lora_weights.safetensors")
    return state | {f"lora/{name}": weight.numpy().tobytes() for name, weight in lora.items()}


def assert_same_run(output: Path, undisturbed: Path, num_iterations: int = 6) -> None:
    assert [row["iteration"] for row in lasting_metrics(output)] == list(range(num_iterations + 1))
    assert lasting_metrics(output) == lasting_metrics(undisturbed)
    assert final_state(output) == final_state(undisturbed)


@pytest.fixture(scope="module")
def undisturbed(tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(make_config(tiny_weights, tmp_path_factory.mktemp("undisturbed") / "run", *SHORT))


def train_until_killed(world: World, config: DictConfig, moment: str, count: int) -> None:
    """SIGKILL as this process calls the function of that name for the ``count``th time."""
    # by hand, without a launcher
    del os.environ["RANK"]
    real, calls = resolve_name(moment), []

    def die(*arguments: Any, **settings: Any) -> Any:
        calls.append(1)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **settings)

    with mock.patch(moment, die):
        train(config)


def test_a_run_killed_three_times_ends_as_an_undisturbed_one(
    undisturbed: Path, tiny_weights: Path, tmp_path: Path, on_ranks: Ranks
) -> None:
    output = tmp_path / "run"
    # else training might be killed before a thread has written what it began two iterations ago
    config = make_config(tiny_weights, output, *SHORT, "resume=true", "checkpoint.asynchronous=false")
    # before there is a checkpoint; between the last line of metrics and its checkpoint; in the thread that writes one
    moments = ("update.Update._optimizer_step", "trainer.Trainer._save", "checkpoints.checkpoint.finish_sealed")
    written = []
    for moment in moments:
        on_ranks(1, train_until_killed, config, f"fastgrpo.{moment}", 2, killed=[0])
        written.append([row["iteration"] for row in read_rows(output / "metrics.jsonl")][-1])
    assert written == [0, 4, 6]
    assert sorted(path.name for path in (output / "checkpoints").glob("step_*")) == ["step_000002", "step_000004"]
    train(config)
    assert_same_run(output, undisturbed)


def test_a_damaged_checkpoint_is_passed_over(
    undisturbed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "run"
    shutil.copytree(undisturbed, output)
    weights = output / "checkpoints/step_000006/weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    # all else is in its config, also that its prompts are where the undisturbed run has them
    train(load_config("train", [f"output={output}", "resume=true"]))
    assert f"skipping checkpoint {weights.parent}" in caplog.text
    assert_same_run(output, undisturbed)


def test_a_signal_saves_and_stops_with_a_message_and_the_run_goes_on(
    undisturbed: Path, tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, step = tmp_path / "run", Trainer.step

    def step_and_hear(trainer: Trainer) -> dict[str, float]:
        # an odd iteration, of which only the signal makes a checkpoint
        if trainer.iteration == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer)

    with mock.patch.object(Trainer, "step", step_and_hear):
        assert main(["train", *make_overrides(tiny_weights, output, *SHORT)]) == PREEMPTED
    said = "stopped by signal 15 after iteration 3, which is saved; go on with resume=true"
    assert said in capsys.readouterr().err
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["step_000002", "step_000003"]
    train(make_config(tiny_weights, output, *SHORT, "resume=true"))
    assert_same_run(output, undisturbed)


IMAGES = (
    "algorithm=nft",
    "algorithm.schedule.num_steps=3",
    "train.updates=3",
    "train.optimizer_steps=2",
    "train.old_policy_growth=0.2",
    "train.warmup_iterations=5",
    "train.ema_share=0.5",
    "evaluate.every=3",
    "train.learning_rate=1e-2",
    "checkpoint.every=2",
)


def test_a_run_on_images_goes_on_with_its_old_policy_and_learning_rate(tiny_weights: Path, tmp_path: Path) -> None:
    whole, output = (tmp_path / name / "run" for name in ("whole", "halves"))
    train(make_config(tiny_weights, whole, *IMAGES, "train.iterations=6"))
    train(make_config(tiny_weights, output, *IMAGES, "train.iterations=3"))
    train(make_config(tiny_weights, output, *IMAGES, "train.iterations=6", "resume=true"))
    assert_same_run(output, whole)
    assert "old.safetensors" in final_state(whole)
    rates = [row["learning_rate"] for row in lasting_metrics(whole)[1:]]
    assert rates == pytest.approx([2e-3, 4e-3, 6e-3, 8e-3, 1e-2, 1e-2])


# forks of one process that has imported everything but computed nothing: a second saved for each child
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["tests.checkpoints.resume_child", "diffusers", "transformers", "torch.utils.tensorboard"]
)
# a machine that is busy with something else takes many times longer
PATIENCE_SECONDS = 600


def start(weights: Path, output: Path, *overrides: str) -> BaseProcess:
    arguments = make_overrides(weights, output, *LONG, *overrides)
    child = CONTEXT.Process(target=resume_child.run, args=(arguments, str(output.parent / "child.log")))
    child.start()
    return child


def finish(child: BaseProcess, output: Path) -> None:
    child.join(PATIENCE_SECONDS)
    assert child.exitcode == 0, (output.parent / "child.log").read_text()


def iterations_done(output: Path) -> int:
    """The last whole line of the metrics; read as it grows."""
    path = output / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["iteration"] if lines else -1


def wait_for_iteration(iteration: int, output: Path, process: BaseProcess | subprocess.Popen) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while iterations_done(output) < iteration:
        code = process.exitcode if isinstance(process, BaseProcess) else process.poll()
        assert code is None, f"ended with {code} before iteration {iteration}"
        assert time.monotonic() < deadline, f"iteration {iteration} did not come"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def long_undisturbed(tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(start(tiny_weights, output), output)
    return output


@pytest.mark.slow
def test_a_process_killed_at_three_random_moments_leaves_an_undisturbed_run(
    long_undisturbed: Path, tiny_weights: Path, tmp_path: Path
) -> None:
    output, generator = tmp_path / "run", random.Random()
    # the first kill comes before there is a checkpoint
    for wanted in (0, 4, 9):
        child = start(tiny_weights, output, "resume=true")
        wait_for_iteration(wanted, output, child)
        # anywhere in the next two iterations: in a rollout, an update, a line of metrics or a checkpoint
        time.sleep(generator.uniform(0.0, 0.2))
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join(PATIENCE_SECONDS)
        assert child.exitcode == -signal.SIGKILL
        assert iterations_done(output) < 12
    finish(start(tiny_weights, output, "resume=true"), output)
    assert_same_run(output, long_undisturbed, 12)


@pytest.mark.slow
def test_a_process_that_gets_sigterm_saves_and_stops_with_a_message_and_the_run_goes_on(
    long_undisturbed: Path, tiny_weights: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    command = [sys.executable, "-m", "fastgrpo", "train", *make_overrides(tiny_weights, output, *LONG)]
    # an odd iteration, of which only the signal makes a checkpoint
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_iteration(3, output, process)
    process.terminate()
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == PREEMPTED
    stopped_after = iterations_done(output)
    assert f"stopped by signal 15 after iteration {stopped_after}, which is saved; go on with resume=true" in errors
    assert (output / f"checkpoints/step_{stopped_after:06d}").is_dir()
    assert stopped_after < 12
    train(make_config(tiny_weights, output, *LONG, "resume=true"))
    assert_same_run(output, long_undisturbed, 12)
