"""All that a training run needs to go on, as named tensors and JSON: what a checkpoint holds.

    weights/<name>   what is trained
    ema/<name>       its moving average
    old/<name>       the old policy, where it is not the policy itself
    optimizer/<path> the optimizer's tensors, flattened (``tensor_tree.py``)
    proposal/<name>  the learned distribution of start noise and its optimizer's, where one is learned
    JSON             everything else

Read back, tensors are whole, or sharded as those of a run that has just begun.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastgrpo.checkpoints.shards import StoredTensors
from fastgrpo.checkpoints.tensor_tree import flatten, unflatten

KINDS = ("weights", "ema", "old", "optimizer", "proposal")
STATE = "state.json"
# what the JSON and the names of tensors are to be read by; 1 had one file of each kind, and names without the kind
_FORMAT = 2
_REMEDY = "use the model and LoRA settings it was saved with, or start a new run with another name"
_OF_WEIGHT = re.compile(r"optimizer/state/(\d+)/.*")

Sizes = Mapping[str, tuple[torch.Size, torch.dtype]]


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read; the message names the path and the remedy."""


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """All that a run needs to go on.  ``model`` is a fingerprint of the frozen base that the weights belong to.

    Tensors are plain, and then equal on all ranks, or DTensors.  The optimizer has its parameters in the order of
    ``weights``.
    """

    iteration: int
    seconds: float
    weights: dict[str, Tensor]
    ema: dict[str, Tensor]
    old: dict[str, Tensor]
    optimizer: dict[str, Any]
    model: str
    extra: dict[str, Any]
    proposal: dict[str, Tensor] = field(default_factory=dict)


def as_named_tensors(state: TrainState) -> tuple[dict[str, Tensor], str]:
    """The tensors by kind and name, and the rest as JSON; ValueError for what JSON would change."""
    optimizer, optimizer_tensors = flatten(state.optimizer)
    values = {
        "format": _FORMAT,
        "iteration": state.iteration,
        "seconds": state.seconds,
        "model": state.model,
        "extra": state.extra,
        "optimizer": optimizer,
    }
    text = json.dumps(values, indent=1)
    if json.loads(text)["extra"] != state.extra:
        raise ValueError("extra does not survive JSON; use string keys, lists, strings and finite numbers only")
    kinds = zip(KINDS, (state.weights, state.ema, state.old, optimizer_tensors, state.proposal), strict=True)
    return {f"{kind}/{name}": tensor for kind, tensors in kinds for name, tensor in tensors.items()}, text


def read_state(path: Path, fresh: TrainState | None) -> TrainState:
    """What the files of a directory hold, placed as in ``fresh``, which it must match; whole tensors without one."""
    values, stored = _open(path)
    if fresh is not None:
        _check_model(path, values["model"], fresh.model)
        _check_fit(path, "weights", stored.sizes, fresh.weights)
        _check_fit(path, "ema", stored.sizes, fresh.ema)
        _check_fit(path, "old", stored.sizes, fresh.old)
        _check_fit(path, "proposal", stored.sizes, fresh.proposal)
    tensors = stored.read(stored.sizes, _places(stored.sizes, fresh) if fresh is not None else {})
    weights, ema, old, optimizer, proposal = (_of_kind(kind, tensors) for kind in KINDS)
    return TrainState(
        iteration=values["iteration"],
        seconds=values["seconds"],
        weights=weights,
        ema=ema,
        old=old,
        optimizer=unflatten(values["optimizer"], optimizer),
        model=values["model"],
        extra=values["extra"],
        proposal=proposal,
    )


def read_proposal(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a learned proposal is, as plain data, and its weights; both empty where none was learned."""
    values, stored = _open(path)
    names = [name for name in stored.sizes if name.startswith("proposal/weights/")]
    found = _of_kind("proposal", stored.read(names, {}))
    weights = {name.removeprefix("weights/"): weight for name, weight in found.items()}
    return values["extra"].get("proposal", {}), weights


def read_averages(path: Path, weights: Mapping[str, Tensor], model: str) -> dict[str, Tensor]:
    """The moving averages alone, whole, for the weights that they are averages of, which may be of another type."""
    values, stored = _open(path)
    _check_model(path, values["model"], model)
    _check_fit(path, "ema", stored.sizes, weights, any_type=True)
    return _of_kind("ema", stored.read([name for name in stored.sizes if name.startswith("ema/")], {}))


def _open(path: Path) -> tuple[dict[str, Any], StoredTensors]:
    values = json.loads((path / STATE).read_bytes())
    if values.get("format") != _FORMAT:
        raise CheckpointError(
            f"checkpoint {path} is of another format than {_FORMAT}, which this version reads; go on with the version "
            "that wrote it, or start a new run with another name"
        )
    return values, StoredTensors(path)


def _of_kind(kind: str, named: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(f"{kind}/"): value for name, value in named.items() if name.startswith(f"{kind}/")}


def _places(sizes: Sizes, fresh: TrainState) -> dict[str, DTensor]:
    """The DTensor that each stored tensor is to be sharded as."""
    named = {f"weights/{name}": tensor for name, tensor in fresh.weights.items()}
    named |= {f"ema/{name}": tensor for name, tensor in fresh.ema.items()}
    named |= {f"old/{name}": tensor for name, tensor in fresh.old.items()}
    weights = list(fresh.weights.values())
    for name, (shape, _) in sizes.items():
        match = _OF_WEIGHT.fullmatch(name)
        if match and weights[int(match[1])].shape == shape:
            named[name] = weights[int(match[1])]
    return {name: tensor for name, tensor in named.items() if isinstance(tensor, DTensor)}


def _check_model(path: Path, saved: str, wanted: str) -> None:
    if saved != wanted:
        raise CheckpointError(f"checkpoint {path} is of model {saved}, this run's is {wanted}; {_REMEDY}")


def _check_fit(path: Path, kind: str, sizes: Sizes, wanted: Mapping[str, Tensor], *, any_type: bool = False) -> None:
    difference = _first_difference(_of_kind(kind, sizes), wanted, any_type)
    if difference:
        raise CheckpointError(f"checkpoint {path} does not fit this run's {kind}: {difference}; {_REMEDY}")


def _first_difference(saved: Sizes, wanted: Mapping[str, Tensor], any_type: bool) -> str | None:
    for name in sorted(saved.keys() ^ wanted.keys()):
        return f"{name} is only in {'the checkpoint' if name in saved else 'the run'}"
    for name, (shape, dtype) in saved.items():
        if shape != wanted[name].shape or (dtype != wanted[name].dtype and not any_type):
            here = f"{list(wanted[name].shape)} {wanted[name].dtype}"
            return f"{name} is {list(shape)} {dtype} in the checkpoint and {here} in the run"
    return None
