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

import pytest
import safetensors.torch

from fastgrpo.cli import PREEMPTED
from fastgrpo.config import load_config
from fastgrpo.records.json_lines import read_rows
from fastgrpo.train import train
from tests.checkpoints import resume_child
from tests.tiny_config import make_overrides

NUM_ITERATIONS = 12
SETTINGS = (
    f"train.iterations={NUM_ITERATIONS}",
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
# forks of one process that has imported everything but computed nothing: a second saved for each child
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["tests.checkpoints.resume_child", "diffusers", "transformers", "torch.utils.tensorboard"]
)
# a machine that is busy with something else takes many times longer
PATIENCE_SECONDS = 600


def start(weights: Path, output: Path, *overrides: str) -> BaseProcess:
    arguments = make_overrides(weights, output, *SETTINGS, *overrides)
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


def lasting_metrics(output: Path) -> list[dict]:
    """Everything measured but time and memory."""
    varying = ("seconds", "images_per_second", "peak_bytes")
    return [
        {key: value for key, value in row.items() if not key.startswith(varying)}
        for row in read_rows(output / "metrics.jsonl")
    ]


def final_state(output: Path) -> dict[str, bytes]:
    """All that was learned, bit for bit: weights, averages, optimizer and the exported adapters."""
    checkpoint = output / f"checkpoints/step_{NUM_ITERATIONS:06d}"
    names = ("weights.safetensors", "ema.safetensors", "optimizer.safetensors")
    state = {name: (checkpoint / name).read_bytes() for name in names}
    # the order of a file's metadata differs from process to process, its tensors do not
    lora = safetensors.torch.load_file(output / "lora/pytorch_lora_weights.safetensors")
    return state | {f"lora/{name}": weight.numpy().tobytes() for name, weight in lora.items()}


@pytest.fixture(scope="module")
def undisturbed(tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(start(tiny_weights, output), output)
    return output


def assert_same_run(output: Path, undisturbed: Path) -> None:
    assert [row["iteration"] for row in lasting_metrics(output)] == list(range(NUM_ITERATIONS + 1))
    assert lasting_metrics(output) == lasting_metrics(undisturbed)
    assert final_state(output) == final_state(undisturbed)


def test_a_run_killed_three_times_ends_as_an_undisturbed_one(
    undisturbed: Path, tiny_weights: Path, tmp_path: Path
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
        assert iterations_done(output) < NUM_ITERATIONS
    finish(start(tiny_weights, output, "resume=true"), output)
    assert_same_run(output, undisturbed)


def test_a_damaged_checkpoint_is_passed_over(
    undisturbed: Path, tiny_weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "run"
    shutil.copytree(undisturbed, output)
    weights = output / f"checkpoints/step_{NUM_ITERATIONS:06d}/weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    train(load_config("train", make_overrides(tiny_weights, output, *SETTINGS, "resume=true")))
    assert f"skipping checkpoint {weights.parent}" in caplog.text
    assert_same_run(output, undisturbed)


def test_sigterm_saves_and_stops_with_a_message_and_the_run_goes_on(
    undisturbed: Path, tiny_weights: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    command = [sys.executable, "-m", "fastgrpo.train", *make_overrides(tiny_weights, output, *SETTINGS)]
    # an odd iteration, of which only the signal makes a checkpoint
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_iteration(3, output, process)
    process.terminate()
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == PREEMPTED
    stopped_after = iterations_done(output)
    assert f"stopped by signal 15 after iteration {stopped_after}, which is saved; go on with resume=true" in errors
    assert (output / f"checkpoints/step_{stopped_after:06d}").is_dir()
    assert stopped_after < NUM_ITERATIONS
    train(load_config("train", make_overrides(tiny_weights, output, *SETTINGS, "resume=true")))
    assert_same_run(output, undisturbed)
