"""What a run writes and shows beside its checkpoints: by its first rank, and by no other.

``Record`` is the first rank's: metrics, pictures, the report on ranks, progress.  ``NoRecord`` is that of all others.
Letter: R ranks.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from fastgrpo.compile.blocks import num_compilations
from fastgrpo.evaluation import EvaluationResult
from fastgrpo.files.run_directory import RunDirectory
from fastgrpo.records.metrics import Metrics
from fastgrpo.records.progress import Progress
from fastgrpo.records.remarks import LOOKS_BACK, remark_on
from fastgrpo.records.stragglers import Stragglers


class Recorder(Protocol):
    """What a trainer tells."""

    def truncate_to(self, metrics: int, ranks: int) -> None:
        """A resumed run drops what was written of later iterations."""

    def open(self, num_iterations: int, first: int, max_seconds: float) -> AbstractContextManager[None]:
        """Around the training of iterations ``first`` + 1 to ``num_iterations``."""

    def row(self, iteration: int, values: Mapping[str, float]) -> None:
        """An iteration's metrics."""

    def ranks(self, iteration: int, seconds: Mapping[str, Sequence[float]], waited_R: Sequence[float]) -> None:
        """Own seconds of each rank by stage, and those that it waited."""

    def evaluation(self, iteration: int, result: EvaluationResult) -> None:
        """The pictures of an evaluation."""

    def finish(self) -> None:
        """The curves and the summary of a run that came to its end."""


@dataclass(kw_only=True)
class Record:
    """Writes into ``directory``."""

    directory: RunDirectory
    metrics: Metrics
    stragglers: Stragglers
    _progress: Progress | None = field(default=None, init=False)
    # the rows that a remark is made of
    _last: list[Mapping[str, float]] = field(default_factory=list, init=False)

    def truncate_to(self, metrics: int, ranks: int) -> None:
        self.metrics.truncate_to(metrics)
        self.stragglers.truncate_to(ranks)

    @contextmanager
    def open(self, num_iterations: int, first: int, max_seconds: float) -> Iterator[None]:
        self._progress = Progress(
            num_iterations, first=first, max_seconds=max_seconds, num_compilations=num_compilations
        )
        with self.metrics, self._progress:
            yield

    def row(self, iteration: int, values: Mapping[str, float]) -> None:
        assert self._progress is not None
        self.metrics.log(iteration, values)
        self._last = [*self._last, values][-LOOKS_BACK:]
        self._progress.remark(remark_on(self._last))
        self._progress.update(iteration, values)

    def ranks(self, iteration: int, seconds: Mapping[str, Sequence[float]], waited_R: Sequence[float]) -> None:
        if len(waited_R) > 1:
            self.stragglers.add(iteration, seconds, waited_R)

    def evaluation(self, iteration: int, result: EvaluationResult) -> None:
        self.metrics.evaluation_grid(iteration, result.images, result.texts, result.verified)

    def finish(self) -> None:
        self.metrics.finish()
        if table := self.stragglers.table():
            print(table)


class NoRecord:
    """Writes nothing."""

    def truncate_to(self, metrics: int, ranks: int) -> None:
        pass

    @contextmanager
    def open(self, num_iterations: int, first: int, max_seconds: float) -> Iterator[None]:
        yield

    def row(self, iteration: int, values: Mapping[str, float]) -> None:
        pass

    def ranks(self, iteration: int, seconds: Mapping[str, Sequence[float]], waited_R: Sequence[float]) -> None:
        pass

    def evaluation(self, iteration: int, result: EvaluationResult) -> None:
        pass

    def finish(self) -> None:
        pass
