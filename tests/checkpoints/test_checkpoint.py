"""A checkpoint is exact, appears whole or not at all, and is refused when a single bit of it has changed."""

import errno
import itertools
import json
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader

from fastgrpo.checkpoints.checkpoint import Checkpoint, CheckpointError, TrainState
from fastgrpo.checkpoints.shards import Shard, write_shards
from fastgrpo.files.sealed import MANIFEST, REPLACED, write_sealed

FILES = ("weights.safetensors", "ema.safetensors", "old.safetensors", "optimizer.safetensors", "state.json")


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3, dtype=torch.float32))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(4, 5, generator=generator)).square().mean().backward()
        optimizer.step()


def make_state(iteration: int = 1, seed: int = 0) -> TrainState:
    model = make_model(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    train(model, optimizer, 0, 2)
    ema = {name: value * 0.5 for name, value in model.state_dict().items()}
    state = optimizer.state_dict()
    extra = {"sampler": [1, 2.5, None], "name": "ü"}
    return TrainState(
        iteration=iteration,
        seconds=0.1 + 0.2,
        weights=model.state_dict(),
        ema=ema,
        old={name: value * 0.25 for name, value in model.state_dict().items()},
        optimizer=state,
        model="tiny",
        extra=extra,
    )


def same(a: Any, b: Any) -> bool:
    """Equal in every bit, container type and key."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def bits(tensor: Tensor) -> list[int]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return Checkpoint(tmp_path / "checkpoints", every=2, keep=2)


def names(checkpoint: Checkpoint) -> list[str]:
    return sorted(path.name for path in checkpoint.directory.iterdir())


def test_the_round_trip_is_bitwise(checkpoint: Checkpoint) -> None:
    state = make_state()
    state.weights["odd"] = torch.tensor([float("nan"), float("-inf"), -0.0, 1e-45])
    state.weights["bfloat16"] = torch.arange(6, dtype=torch.bfloat16).view(2, 3).t()
    state.weights["tied"] = state.weights["0.weight"]
    state.weights["view"] = torch.arange(10)[2:5]
    state.weights["empty"] = torch.empty(0, 4)
    loaded = checkpoint.load(checkpoint.save(state))
    assert {name: bits(value) for name, value in loaded.weights.items()} == {
        name: bits(value) for name, value in state.weights.items()
    }
    assert loaded.weights["bfloat16"].shape == (3, 2)
    for kind in ("iteration", "seconds", "optimizer", "model", "extra"):
        assert same(getattr(loaded, kind), getattr(state, kind)), kind
    assert same(dict(sorted(loaded.ema.items())), dict(sorted(state.ema.items())))


def test_equal_states_give_equal_files(checkpoint: Checkpoint, tmp_path: Path) -> None:
    other = Checkpoint(tmp_path / "other", every=1, keep=1)
    paths = [checkpoint.save(make_state()), other.save(make_state())]
    for name in (*FILES, MANIFEST):
        assert (paths[0] / name).read_bytes() == (paths[1] / name).read_bytes()


def test_adamw_goes_on_identically(checkpoint: Checkpoint) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, 0, 3)
    saved = replace(make_state(3), weights=model.state_dict(), optimizer=optimizer.state_dict())
    state = checkpoint.load(checkpoint.save(saved))
    resumed = make_model(seed=1)
    resumed.load_state_dict(state.weights)
    resumed_optimizer = torch.optim.AdamW(resumed.parameters(), lr=9.0)
    resumed_optimizer.load_state_dict(state.optimizer)
    train(model, optimizer, 3, 6)
    train(resumed, resumed_optimizer, 3, 6)
    assert same(dict(resumed.state_dict()), dict(model.state_dict()))
    assert same(resumed_optimizer.state_dict(), optimizer.state_dict())


def test_the_last_keep_stay(checkpoint: Checkpoint) -> None:
    for iteration in (2, 4, 6):
        checkpoint.save(make_state(iteration))
    assert names(checkpoint) == ["step_000004", "step_000006"]
    latest = checkpoint.latest()
    assert latest is not None
    assert checkpoint.load(latest).iteration == 6


def test_a_run_resumed_from_an_earlier_checkpoint_replaces_the_later_ones(checkpoint: Checkpoint) -> None:
    for iteration in (10, 20):
        checkpoint.save(make_state(iteration))
    checkpoint.save(make_state(11, seed=1))
    assert names(checkpoint) == ["step_000010", "step_000011"]


def test_saving_an_iteration_again_replaces_it(checkpoint: Checkpoint) -> None:
    checkpoint.save(make_state(4, seed=0))
    path = checkpoint.save(make_state(4, seed=1))
    assert same(checkpoint.load(path).weights["0.bias"], make_state(4, seed=1).weights["0.bias"])
    assert names(checkpoint) == ["step_000004"]


def test_a_kill_between_the_two_renames_of_a_replacement_loses_nothing(checkpoint: Checkpoint) -> None:
    path = checkpoint.save(make_state(4))
    path.rename(path.with_name(REPLACED + path.name))
    latest = checkpoint.latest()
    assert latest is not None
    assert checkpoint.load(latest).iteration == 4


def test_there_is_no_latest_in_an_empty_or_missing_directory(checkpoint: Checkpoint) -> None:
    assert checkpoint.latest() is None
    checkpoint.directory.mkdir()
    (checkpoint.directory / "step_notes").mkdir()
    assert checkpoint.latest() is None


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
@pytest.mark.parametrize("damage", ["missing", "empty", "short", "long", "flipped"])
def test_damage_to_any_file_is_found(
    checkpoint: Checkpoint, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint.save(make_state(2))
    path = checkpoint.save(make_state(4))
    content = (path / name).read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    damaged = {"empty": b"", "short": content[:-1], "long": content + b"\n", "flipped": flipped}
    if damage == "missing":
        (path / name).unlink()
    else:
        (path / name).write_bytes(damaged[damage])
    with pytest.raises(CheckpointError, match=rf"{name}.*resume from another checkpoint, or delete this one"):
        checkpoint.load(path)
    with caplog.at_level(logging.WARNING):
        latest = checkpoint.latest()
    assert latest is not None
    assert latest.name == "step_000002"
    assert f"skipping checkpoint {path}" in caplog.text


def test_every_flipped_bit_of_the_manifest_is_found(checkpoint: Checkpoint) -> None:
    path = checkpoint.save(make_state())
    manifest = (path / MANIFEST).read_bytes()
    for bit in range(0, 8 * len(manifest), 13):
        damaged = bytearray(manifest)
        damaged[bit // 8] ^= 1 << bit % 8
        (path / MANIFEST).write_bytes(damaged)
        with pytest.raises(CheckpointError):
            checkpoint.load(path)


@pytest.mark.parametrize("manifest", ["[]", "{}", '{"files": 3}', '{"files": {"state.json": 1}}', "[" * 10**5])
def test_a_manifest_of_another_making_is_refused(checkpoint: Checkpoint, manifest: str) -> None:
    path = checkpoint.save(make_state())
    (path / MANIFEST).write_text(manifest)
    with pytest.raises(CheckpointError, match=MANIFEST):
        checkpoint.load(path)


def test_a_path_that_is_no_checkpoint_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere does not exist; give the path of a step_\* directory"):
        checkpoint.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read"):
        checkpoint.load(tmp_path)


def test_another_models_checkpoint_is_refused(checkpoint: Checkpoint) -> None:
    fresh = make_state()
    path = checkpoint.save(fresh)
    assert checkpoint.load_matching(path, fresh).iteration == 1
    weights = fresh.weights
    others = {
        "of model tiny, this run's is large": replace(fresh, model="large"),
        r"weights: 0\.bias is only in the checkpoint": replace(
            fresh, weights={name: value for name, value in weights.items() if name != "0.bias"}
        ),
        "weights: new is only in the run": replace(fresh, weights=weights | {"new": torch.zeros(1)}),
        r"ema: 0\.bias is \[7\] torch\.float32 in the checkpoint and \[8\]": replace(
            fresh, ema=fresh.ema | {"0.bias": torch.zeros(8)}
        ),
        r"0\.bias is .* and \[7\] torch\.bfloat16 in the run": replace(
            fresh, weights=weights | {"0.bias": torch.zeros(7, dtype=torch.bfloat16)}
        ),
    }
    for message, other in others.items():
        with pytest.raises(CheckpointError, match=message + ".*; use the model and LoRA settings it was saved with"):
            checkpoint.load_matching(path, other)


@pytest.mark.parametrize("extra", [{"key": object()}, {1: "integer key"}, {"pair": (1, 2)}, {"x": float("nan")}])
def test_what_json_would_change_is_refused_before_writing(checkpoint: Checkpoint, extra: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        checkpoint.save(replace(make_state(), extra=extra))
    assert not checkpoint.directory.exists()


@pytest.mark.parametrize("failing_call", range(7))
def test_a_full_disk_leaves_the_earlier_checkpoints(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, failing_call: int
) -> None:
    checkpoint.save(make_state(2))
    calls = []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > failing_call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(CheckpointError, match=r"step_000004 .*No space left on device.*; free space on that disk"):
            checkpoint.save(make_state(4))
    assert names(checkpoint) == ["step_000002"]
    assert checkpoint.load(checkpoint.directory / "step_000002").iteration == 2
    checkpoint.save(make_state(4))
    assert names(checkpoint) == ["step_000002", "step_000004"]


def test_a_full_disk_that_safetensors_reports_is_named_too(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_file(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", save_file)
    with pytest.raises(CheckpointError, match=r"cannot write checkpoint .*step_000002 .*No space left.*; free space"):
        checkpoint.save(make_state(2))
    assert names(checkpoint) == []


def test_a_gpu_that_fails_as_it_is_copied_from_is_no_full_disk(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered")

    monkeypatch.setattr(Checkpoint, "_files", fail)
    with pytest.raises(torch.AcceleratorError, match="ECC"):
        checkpoint.save(make_state(2))


def test_an_unwritable_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"cannot write checkpoint .*file/checkpoints/step_000001"):
        Checkpoint(tmp_path / "file" / "checkpoints", every=1, keep=1).save(make_state())


def test_bad_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"checkpoint\.every"):
        Checkpoint(tmp_path, every=0, keep=1)
    with pytest.raises(ValueError, match=r"checkpoint\.keep"):
        Checkpoint(tmp_path, every=1, keep=0)


def save_for_ever(directory: Path, done: Connection) -> None:
    torch.set_num_threads(1)
    checkpoint = Checkpoint(directory, every=1, keep=1)
    for iteration in itertools.count(1):
        weights = {"w": torch.full((200_000,), float(iteration))}
        # each is saved twice, so that replacing is under attack too
        for seconds in (0.0, 1.0):
            checkpoint.save(replace(make_state(iteration), seconds=seconds, weights=weights, ema=weights, optimizer={}))
        done.send(iteration)


def test_a_run_killed_while_saving_always_leaves_its_last_checkpoint(tmp_path: Path) -> None:
    # autograd's threads do not outlive a fork, which a PyTorch that is built for CUDA has
    directory, context = tmp_path / "checkpoints", multiprocessing.get_context("spawn")
    done, theirs = context.Pipe(duplex=False)
    process = context.Process(target=save_for_ever, args=(directory, theirs), daemon=True)
    process.start()
    theirs.close()
    assert process.pid is not None
    assert done.recv() == 1
    checkpoint = Checkpoint(directory, every=1, keep=1)
    try:
        for round_ in range(12):
            # one process is stopped at many instants: what then stands is what a kill leaves
            time.sleep(0.003 + 0.0071 * round_)
            os.kill(process.pid, signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED)
            copy = tmp_path / f"copy_{round_}"
            shutil.copytree(directory, copy)
            state = resume(Checkpoint(copy, every=1, keep=1))
            assert set(state.weights["w"].tolist()) == {float(state.iteration)}
            os.kill(process.pid, signal.SIGCONT)
    finally:
        process.kill()
        process.join()
    told = 1
    with suppress(EOFError):
        while True:
            told = done.recv()
    state = resume(checkpoint)
    assert state.iteration >= told > 1
    checkpoint.save(replace(state, iteration=state.iteration + 1))
    assert names(checkpoint) == [f"step_{state.iteration + 1:06d}"]


def resume(checkpoint: Checkpoint) -> TrainState:
    latest = checkpoint.latest()
    assert latest is not None
    return checkpoint.load(latest)


def test_torch_distributed_checkpoint_reads_what_is_saved(checkpoint: Checkpoint) -> None:
    state = make_state()
    path = checkpoint.save(state)
    read = {f"weights/{name}": torch.zeros_like(weight) for name, weight in state.weights.items()}
    read |= {f"optimizer/state/{i}/exp_avg": torch.zeros_like(w) for i, w in enumerate(state.weights.values())}
    torch.distributed.checkpoint.load(read, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)
    for i, (name, weight) in enumerate(state.weights.items()):
        assert same(read[f"weights/{name}"], weight)
        assert same(read[f"optimizer/state/{i}/exp_avg"], state.optimizer["state"][i]["exp_avg"])


def test_averages_are_read_alone_whatever_the_type_and_damage_of_the_rest(checkpoint: Checkpoint) -> None:
    state = make_state()
    path = checkpoint.save(state)
    damage = bytearray((path / "optimizer.safetensors").read_bytes())
    damage[-1] ^= 1
    (path / "optimizer.safetensors").write_bytes(damage)
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors is damaged"):
        checkpoint.load(path)
    halves = {name: weight.bfloat16() for name, weight in state.weights.items()}
    averages = checkpoint.load_averages(path, halves, "tiny")
    assert averages.keys() == state.ema.keys()
    assert all(same(averages[name], average) for name, average in state.ema.items())
    with pytest.raises(CheckpointError, match="of model tiny, this run's is large"):
        checkpoint.load_averages(path, halves, "large")
    with pytest.raises(CheckpointError, match=r"ema: 1\.bias is only in the checkpoint"):
        checkpoint.load_averages(path, {name: w for name, w in halves.items() if name != "1.bias"}, "tiny")


def test_an_asynchronous_save_is_of_the_state_as_it_was_and_stands_after_wait(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "checkpoints", every=1, keep=1, asynchronous=True)
    state = make_state(1)
    before = {name: weight.clone() for name, weight in state.weights.items()}
    may_write = threading.Event()
    fsync = os.fsync

    def fsync_when_told(descriptor: int) -> None:
        assert may_write.wait(60)
        fsync(descriptor)

    with mock.patch.object(os, "fsync", fsync_when_told):
        path = checkpoint.save(state)
        assert not path.exists()
        for weight in state.weights.values():
            weight.zero_()
        may_write.set()
        checkpoint.wait()
    assert path.exists()
    assert same(dict(sorted(checkpoint.load(path).weights.items())), dict(sorted(before.items())))


def test_an_asynchronous_save_that_failed_is_raised_once_by_what_is_called_next(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "checkpoints", every=1, keep=1, asynchronous=True)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with mock.patch.object(os, "fsync", side_effect=full):
        checkpoint.save(make_state(1))
        with pytest.raises(CheckpointError, match=r"step_000001 .*No space left on device"):
            checkpoint.save(make_state(2))
    checkpoint.wait()
    assert names(checkpoint) == []
    checkpoint.save(make_state(3))
    assert checkpoint.latest() == checkpoint.directory / "step_000003"


def reseal(path: Path) -> None:
    """A manifest that is right about what is there now."""
    files = {file.name: file.read_bytes() for file in path.iterdir() if file.name != MANIFEST}
    shutil.rmtree(path)
    write_sealed(path, {name: partial(Path.write_bytes, data=content) for name, content in files.items()})


def test_a_checkpoint_of_another_format_is_refused_and_not_passed_over(checkpoint: Checkpoint) -> None:
    path = checkpoint.save(make_state())
    state = json.loads((path / "state.json").read_text())
    del state["format"]
    (path / "state.json").write_text(json.dumps(state))
    reseal(path)
    # a run that began anew would write over the old one
    assert checkpoint.latest() == path
    with pytest.raises(CheckpointError, match=r"of another format than 2, .*go on with the version that wrote it"):
        checkpoint.load(path)


def test_tensors_that_the_manifest_does_not_list_are_refused(checkpoint: Checkpoint) -> None:
    path = checkpoint.save(make_state())
    shutil.copy(path / "weights.safetensors", path / "weights_of_rank_1.safetensors")
    with pytest.raises(CheckpointError, match=r"weights_of_rank_1\.safetensors is not in manifest\.json"):
        checkpoint.load(path)


def test_a_tensor_of_which_a_part_is_missing_is_refused(checkpoint: Checkpoint) -> None:
    path = checkpoint.save(make_state())
    rows = Shard(torch.ones(2, 5), [5, 0])
    write_shards(path / "ema.safetensors", {"ema/0.weight": rows})
    reseal(path)
    with pytest.raises(CheckpointError, match=r"ema/0\.weight has 10 of 35 elements"):
        checkpoint.load(path)


def test_nothing_in_a_checkpoint_is_a_pickle(checkpoint: Checkpoint) -> None:
    path = checkpoint.save(make_state())
    assert sorted(file.name for file in path.iterdir()) == sorted([*FILES, MANIFEST])
    state = json.loads((path / "state.json").read_text())
    assert state["optimizer"]["param_groups"][0]["betas"] == {"$tuple": [0.9, 0.99]}
