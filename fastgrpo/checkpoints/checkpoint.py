"""Checkpoints: the whole state of a training run, so that a killed run goes on from it as if nothing had happened.

What follows is the same to the bit where kernels compute the same twice: on a CPU, and on a GPU only as far as
runtime.deterministic=true makes them.  Else it differs by rounding, as any two runs do there.

    checkpoints/step_000040/
        weights.safetensors     what is trained
        ema.safetensors         its moving average
        old.safetensors         the old policy, where it is not the policy itself
        optimizer.safetensors   the optimizer's tensors, flattened
        proposal.safetensors    the learned distribution of start noise, where one is learned
        state.json              everything else
        manifest.json           size and SHA-256 of each, written last

Each appears by one rename (``sealed.py``); one that is half written or damaged is never loaded.  Of several ranks, each
writes its part (``shards.py``), as ``weights_of_rank_3.safetensors``; any number of ranks can go on from it.
"""

import logging
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import torch.distributed as dist
from torch import Tensor

from fastgrpo.checkpoints.shards import own_shards, write_shards
from fastgrpo.checkpoints.train_state import (
    KINDS,
    STATE,
    CheckpointError,
    TrainState,
    as_named_tensors,
    read_averages,
    read_proposal,
    read_state,
)
from fastgrpo.device_error import is_device_error
from fastgrpo.distributed.world import RankFailure, World
from fastgrpo.files.sealed import (
    MANIFEST,
    REPLACED,
    TEMPORARY,
    begin_sealed,
    check_files,
    finish_sealed,
    read_manifest,
    write_files,
)

# a rank may be this much slower than another at writing its part
_PATIENCE = timedelta(hours=1)
_NAME = re.compile(rf"({re.escape(REPLACED)})?step_(\d+)")
Loaded = TypeVar("Loaded")
_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Checkpoint:
    """The checkpoints of one run: saved each ``every`` iterations, the last ``keep`` of them kept, and the best one.

    All ranks of ``world`` call its methods together.  What is saved ``asynchronous``ly stands after ``wait``, which
    every other method begins with.
    """

    directory: Path
    every: int
    keep: int
    world: World = field(default_factory=World)
    asynchronous: bool = False
    _pending: Future[None] | None = field(default=None, init=False, repr=False)
    # the iteration of one that is kept whatever follows
    _best: int | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.directory = Path(self.directory)
        if self.every < 1:
            raise ValueError(f"checkpoint.every must be at least 1, got {self.every}")
        if self.keep < 1:
            raise ValueError(f"checkpoint.keep must be at least 1, got {self.keep}")
        self._writers = _beside(self.world)

    def save(self, state: TrainState, best: int | None = None) -> Path:
        """Write ``step_<iteration>``, then delete what it makes superfluous, but not that of the iteration ``best``.

        Asynchronously, this returns when the state has been copied.  Raises CheckpointError, on all ranks, when this
        checkpoint or a pending one cannot be written; earlier ones are intact then.
        """
        self.wait()
        self._best = best
        path = self.directory / f"step_{state.iteration:06d}"
        tensors, text = as_named_tensors(state)
        try:
            temporary = Path(self.world.on_first(lambda: str(begin_sealed(path)), "the directory of a checkpoint"))
            files = self.world.together(lambda: self._files(tensors, text), "the copy of a checkpoint")
        except (OSError, RuntimeError) as error:
            # the copy from the GPU is no matter of disks
            if is_device_error(error):
                raise
            raise self._failure(path, error) from error
        thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending = thread.submit(self._write, path, temporary, files, state.iteration)
        # no thread is left behind when it is done
        thread.shutdown(wait=False)
        if not self.asynchronous:
            self.wait()
        return path

    def wait(self) -> None:
        """Until a pending save is done; CheckpointError, on all ranks, if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def latest(self) -> Path | None:
        """The newest checkpoint that is complete and undamaged; others are skipped with a warning."""
        self.wait()
        # a replaced one counts only if the run was killed before its replacement stood in its place
        for name in self.world.on_first(self._names, "checkpoints"):
            path = self.directory / name
            try:
                self._verify(path, KINDS)
            except (ValueError, RankFailure) as error:
                if self.world.is_first:
                    _log.warning("skipping checkpoint %s: %s", path, error)
            else:
                return path
        return None

    def load(self, path: str | Path) -> TrainState:
        """The state in a checkpoint, bit for bit, on the CPU.  CheckpointError names the file at fault."""
        return self._load(Path(path), KINDS, lambda path: read_state(path, None))

    def load_matching(self, path: str | Path, fresh: TrainState) -> TrainState:
        """As ``load``; CheckpointError unless it belongs to the model of ``fresh``, the state of a run just begun.

        What is sharded in ``fresh``, and the optimizer's tensors of that shape, are sharded and placed as there.
        """
        return self._load(Path(path), KINDS, lambda path: read_state(path, fresh))

    def load_averages(self, path: str | Path, weights: Mapping[str, Tensor], model: str) -> dict[str, Tensor]:
        """Only the moving averages, a quarter of a checkpoint, for a model with these ``weights`` and fingerprint."""
        return self._load(Path(path), ("ema",), lambda path: read_averages(path, weights, model))

    def load_proposal(self, path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a learned proposal is, and its weights; both empty where none was learned."""
        return self._load(Path(path), ("proposal",), read_proposal)

    def _files(self, tensors: Mapping[str, Tensor], text: str) -> dict[str, Callable[[Path], object]]:
        """How each file of this rank is written, from copies of its tensors."""
        rank, size = self.world.rank, self.world.size
        of_rank = f"_of_rank_{rank}" if size > 1 else ""
        shards = own_shards(tensors, rank, size)
        files: dict[str, Callable[[Path], object]] = {}
        for kind in KINDS:
            own = {name: shard for name, shard in shards.items() if name.startswith(f"{kind}/")}
            if own:
                files[f"{kind}{of_rank}.safetensors"] = partial(write_shards, shards=own)
        if self.world.is_first:
            files[STATE] = lambda path: path.write_text(text, encoding="utf-8")
        return files

    def _write(self, path: Path, temporary: Path, files: dict[str, Callable[[Path], object]], iteration: int) -> None:
        """In a thread of each rank; they meet in a group of their own, since training uses the others meanwhile."""
        try:
            own = self._writers.together(lambda: write_files(temporary, files), "files")
            entries = {name: entry for part in self._writers.everyones(own, "entries") for name, entry in part.items()}
            self._writers.on_first(lambda: finish_sealed(temporary, path, entries), "the manifest")
        # safetensors reports a full disk as its own error, gloo a rank that has died as a RuntimeError
        except (OSError, safetensors.SafetensorError, RuntimeError) as error:
            if self.world.is_first:
                shutil.rmtree(temporary, ignore_errors=True)
            raise self._failure(path, error) from error
        if self.world.is_first:
            self._delete_superfluous(iteration)

    def _failure(self, path: Path, error: Exception) -> CheckpointError:
        remedy = "free space on that disk, lower checkpoint.keep, or set the run's directory to another disk"
        of_rank = f"rank {self.world.rank}: " if self.world.size > 1 and not isinstance(error, RankFailure) else ""
        return CheckpointError(f"cannot write checkpoint {path} ({of_rank}{error}); {remedy}")

    def _verify(self, path: Path, kinds: Collection[str]) -> None:
        """ValueError or RankFailure, naming the file, if files of these kinds are not complete and as written."""
        entries = self.world.on_first(lambda: _listed(path), "a manifest")
        wanted = sorted(name for name in entries if name == STATE or re.split("[_.]", name)[0] in kinds)
        own = {name: entries[name] for name in wanted[self.world.rank :: self.world.size]}
        self.world.together(lambda: check_files(path, own), "hashes")

    def _load(self, path: Path, kinds: Collection[str], read: Callable[[Path], Loaded]) -> Loaded:
        self.wait()
        if not path.is_dir():
            raise CheckpointError(f"checkpoint {path} does not exist; give the path of a step_* directory")
        try:
            self._verify(path, kinds)
            return self.world.together(lambda: read(path), "a checkpoint")
        except CheckpointError:
            raise
        except (ValueError, LookupError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
            remedy = "resume from another checkpoint, or delete this one"
            raise CheckpointError(f"checkpoint {path} cannot be loaded: {error}; {remedy}") from error

    def _names(self) -> list[str]:
        """The newest first."""
        return [path.name for path in sorted(self._paths(), key=_age, reverse=True)]

    def _paths(self) -> list[Path]:
        return [path for path in self.directory.glob("*") if _NAME.fullmatch(path.name) and path.is_dir()]

    def _delete_superfluous(self, newest: int) -> None:
        """Keep ``keep`` up to ``newest``, and the best; a later one is of a run that resumed from before it."""
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
        yield from (path for path in current[self.keep :] if _iteration(path) != self._best)


def _age(path: Path) -> tuple[int, str]:
    return _iteration(path), path.name


def _iteration(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[2])


def _beside(world: World) -> World:
    """The same ranks in a group of their own, for a thread."""
    if world.size == 1:
        return World()
    ranks = dist.get_process_group_ranks(world.control)
    group: Any = dist.new_group(ranks, timeout=_PATIENCE, backend="gloo", use_local_synchronization=True)
    return World(rank=world.rank, size=world.size, control=group)


def _listed(path: Path) -> dict[str, dict[str, Any]]:
    entries = read_manifest(path)
    if STATE not in entries:
        raise ValueError(f"{path / MANIFEST} lists no {STATE}")
    for file in path.glob("*.safetensors"):
        # every one of them would be read
        if file.name not in entries:
            raise ValueError(f"{file} is not in {MANIFEST}")
    return entries
