"""Checkpoints: the whole state of a training run, so that a killed run goes on exactly as if nothing had happened.

    checkpoints/step_000040/
        weights.safetensors     what is trained
        ema.safetensors         its moving average
        optimizer.safetensors   the optimizer's tensors, flattened
        state.json              everything else
        manifest.json           size and SHA-256 of each, written last

Each appears by one rename (``sealed.py``); one that is half written or damaged is never loaded.
"""

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from fastgrpo.runtime.sealed import REPLACED, TEMPORARY, read_sealed, write_sealed
from fastgrpo.runtime.tensor_tree import flatten, unflatten

FILES = ("weights.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json")
_NAME = re.compile(rf"({re.escape(REPLACED)})?step_(\d+)")
_log = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read; the message names the path and the remedy."""


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """All that a run needs to go on.  ``model`` is a fingerprint of the frozen base that the weights belong to."""

    iteration: int
    seconds: float
    weights: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Any]
    model: str
    extra: dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """The checkpoints of one run: saved each ``every`` iterations, the last ``keep`` of them kept."""

    directory: Path
    every: int
    keep: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "directory", Path(self.directory))
        if self.every < 1:
            raise ValueError(f"checkpoint.every must be at least 1, got {self.every}")
        if self.keep < 1:
            raise ValueError(f"checkpoint.keep must be at least 1, got {self.keep}")

    def save_if_due(self, state: TrainState) -> Path | None:
        """Save when the iteration is a multiple of ``every``."""
        return self.save(state) if state.iteration > 0 and state.iteration % self.every == 0 else None

    def save(self, state: TrainState) -> Path:
        """Write ``step_<iteration>``, then delete what it makes superfluous.

        Raises CheckpointError when it cannot be written; earlier checkpoints are intact then.
        """
        path = self.directory / f"step_{state.iteration:06d}"
        files = _writers(state)
        try:
            write_sealed(path, files)
        # safetensors reports a full disk as its own error
        except (OSError, safetensors.SafetensorError) as error:
            remedy = "free space on that disk, lower checkpoint.keep, or set the run's directory to another disk"
            raise CheckpointError(f"cannot write checkpoint {path} ({error}); {remedy}") from error
        self._delete_superfluous(state.iteration)
        return path

    def latest(self) -> Path | None:
        """The newest checkpoint that is complete and undamaged; others are skipped with a warning."""
        # a replaced one counts only if the run was killed before its replacement stood in its place
        for path in sorted(self._paths(), key=lambda path: (_iteration(path), path.name), reverse=True):
            try:
                read_sealed(path, FILES)
            except ValueError as error:
                _log.warning("skipping checkpoint %s: %s", path, error)
            else:
                return path
        return None

    def load(self, path: str | Path) -> TrainState:
        """The state in a checkpoint, bit for bit, on the CPU.  CheckpointError names the file at fault."""
        path = Path(path)
        remedy = "resume from another checkpoint, or delete this one"
        if not path.is_dir():
            raise CheckpointError(f"checkpoint {path} does not exist; give the path of a step_* directory")
        try:
            return _from_files(read_sealed(path, FILES))
        except (ValueError, KeyError, TypeError, RecursionError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"checkpoint {path} cannot be loaded: {error}; {remedy}") from error

    def load_matching(self, path: str | Path, fresh: TrainState) -> TrainState:
        """As ``load``; CheckpointError unless it belongs to the model of ``fresh``, the state of a run just begun."""
        state = self.load(path)
        remedy = "use the model and LoRA settings it was saved with, or start a new run with another name"
        if state.model != fresh.model:
            raise CheckpointError(f"checkpoint {path} is of model {state.model}, this run's is {fresh.model}; {remedy}")
        for kind, saved, wanted in (("weights", state.weights, fresh.weights), ("ema", state.ema, fresh.ema)):
            difference = _first_difference(saved, wanted)
            if difference:
                raise CheckpointError(f"checkpoint {path} does not fit this run's {kind}: {difference}; {remedy}")
        return state

    def _paths(self) -> list[Path]:
        return [path for path in self.directory.glob("*") if _NAME.fullmatch(path.name) and path.is_dir()]

    def _delete_superfluous(self, newest: int) -> None:
        """Keep ``keep`` up to ``newest``; a later one was left by a run that has since resumed from before it."""
        for path in self._outdated(newest):
            try:
                # renamed first, so that a kill while deleting leaves no half-deleted checkpoint under its name
                doomed = path if path.name.startswith(".") else path.rename(path.with_name(TEMPORARY + path.name))
                shutil.rmtree(doomed)
            except OSError as error:
                _log.warning("cannot delete the old checkpoint %s: %s", path, error)

    def _outdated(self, newest: int) -> Iterator[Path]:
        yield from self.directory.glob(f"{TEMPORARY}*")
        paths = sorted(self._paths(), key=_iteration, reverse=True)
        yield from (path for path in paths if path.name.startswith(REPLACED) or _iteration(path) > newest)
        current = [path for path in paths if not path.name.startswith(REPLACED) and _iteration(path) <= newest]
        yield from current[self.keep :]


def _iteration(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[2])


def _writers(state: TrainState) -> dict[str, Callable[[Path], object]]:
    """How each file but the manifest is written."""
    optimizer, optimizer_tensors = flatten(state.optimizer)
    values = {
        "iteration": state.iteration,
        "seconds": state.seconds,
        "model": state.model,
        "extra": state.extra,
        "optimizer": optimizer,
    }
    text = json.dumps(values, indent=1)
    if json.loads(text)["extra"] != state.extra:
        raise ValueError("extra does not survive JSON; use string keys, lists, strings and finite numbers only")
    return {
        "weights.safetensors": partial(safetensors.torch.save_file, _owned(state.weights)),
        "ema.safetensors": partial(safetensors.torch.save_file, _owned(state.ema)),
        "optimizer.safetensors": partial(safetensors.torch.save_file, _owned(optimizer_tensors)),
        "state.json": lambda path: path.write_text(text, encoding="utf-8"),
    }


def _owned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, each with a storage of its own, as safetensors asks for: tied tensors and views are copied."""
    storages: set[int] = set()
    owned = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        is_view = tensor.untyped_storage().nbytes() != tensor.nbytes
        owned[name] = tensor.clone() if is_view or pointer in storages else tensor
        storages.add(pointer)
    return owned


def _from_files(files: Mapping[str, bytes]) -> TrainState:
    values = json.loads(files["state.json"])
    weights, ema, optimizer_tensors = (safetensors.torch.load(files[name]) for name in FILES[:3])
    return TrainState(
        iteration=values["iteration"],
        seconds=values["seconds"],
        weights=weights,
        ema=ema,
        optimizer=unflatten(values["optimizer"], optimizer_tensors),
        model=values["model"],
        extra=values["extra"],
    )


def _first_difference(saved: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str | None:
    for name in sorted(saved.keys() ^ wanted.keys()):
        return f"{name} is only in {'the checkpoint' if name in saved else 'the run'}"
    for name, tensor in saved.items():
        if tensor.shape != wanted[name].shape or tensor.dtype != wanted[name].dtype:
            here, there = (f"{list(t.shape)} {t.dtype}" for t in (wanted[name], tensor))
            return f"{name} is {there} in the checkpoint and {here} in the run"
    return None
