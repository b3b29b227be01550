"""The directory of one run, and where each thing in it lies.

    config.yaml  golden.json  metrics.jsonl  evaluations.jsonl  ranks.jsonl  search.jsonl  tensorboard/  images/
    curves.png  summary.json  report.html  checkpoints/step_*/  lora/  proposal/

Files that are written again and again are replaced whole (``write_whole``).  ``.lock`` is empty: who writes the run
holds a lock on it.
"""

import fcntl
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO


@dataclass(frozen=True)
class RunDirectory:
    """Paths of a run; ``RunDirectory.create`` makes the directory and refuses one that is taken or in use."""

    path: Path
    # held for the life of the process, and freed by the system if it is killed
    _lock: IO[bytes] | None = field(default=None, compare=False, repr=False)

    @classmethod
    def create(cls, path: str | Path, *, resume: bool) -> "RunDirectory":
        """ValueError if the directory holds a run and ``resume`` is off, if it is in use, or if it is read-only."""
        run = cls(Path(path))
        try:
            if not resume:
                run.refuse_if_taken()
            run.images.mkdir(parents=True, exist_ok=True)
            # os.access says yes to root and to full or read-only network disks: only writing tells
            with tempfile.TemporaryFile(dir=run.path) as file:
                file.write(b"x")
            lock = open(run.path / ".lock", "wb")  # noqa: SIM115
        except OSError as error:
            remedy = "set output to a directory you can write"
            raise ValueError(f"cannot write the run directory {path} ({error.strerror}); {remedy}") from error
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another process is writing the run in {path}; wait for it, stop it, or give a new name=..."
            ) from error
        return cls(run.path, lock)

    def refuse_if_taken(self) -> None:
        """ValueError if the directory holds a run."""
        if self.is_taken:
            raise ValueError(f"{self.path} already holds a run; continue it with resume=true or give a new name=...")

    @property
    def is_taken(self) -> bool:
        """Whether a run has written here before."""
        return any(path.exists() for path in (self.config, self.metrics, self.checkpoints))

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def golden(self) -> Path:
        """What the rewards scored their golden pairs when the run began."""
        return self.path / "golden.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def evaluations(self) -> Path:
        """The mean scores of each prompt in each evaluation."""
        return self.path / "evaluations.jsonl"

    @property
    def ranks(self) -> Path:
        """How long each rank took for each stage of each iteration, where there are several."""
        return self.path / "ranks.jsonl"

    @property
    def search(self) -> Path:
        """Scores of some of a search's candidates, where there is one."""
        return self.path / "search.jsonl"

    def failed_batch(self, rank: int) -> Path:
        """What a rank leaves for study when its iteration went wrong."""
        return self.path / f"failed_batch{f'_rank_{rank}' * (rank > 0)}.safetensors"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def images(self) -> Path:
        return self.path / "images"

    @property
    def curves(self) -> Path:
        return self.path / "curves.png"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def lora(self) -> Path:
        return self.path / "lora"

    @property
    def proposal(self) -> Path:
        """The learned distribution of start noise, where one is learned."""
        return self.path / "proposal"
