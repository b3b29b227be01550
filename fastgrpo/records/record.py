"""What a run writes and shows beside its checkpoints: by its first rank, and by no other.

``Record`` is the first rank's: metrics, pictures, the report on ranks, progress.  ``NoRecord`` is that of all others.
Letter: R ranks.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from fastgrpo.compile.blocks import num_compilations
from fastgrpo.evaluation import EvaluationResult
from fastgrpo.files.run_directory import RunDirectory
from fastgrpo.health import Preempted
from fastgrpo.records.candidates import search_row
from fastgrpo.records.closing import closing_words
from fastgrpo.records.gallery import save_gallery
from fastgrpo.records.json_lines import append_row, truncate_rows
from fastgrpo.records.metrics import Metrics
from fastgrpo.records.progress import Progress
from fastgrpo.records.remarks import LOOKS_BACK, remark_on
from fastgrpo.records.stragglers import Stragglers
from fastgrpo.types import Noise, Rewards


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

    def search(self, iteration: int, texts: Sequence[str], noise: Noise, rewards: Rewards) -> None:
        """What an iteration's search scored, if there was one."""

    def finish(self) -> None:
        """The curves, the summary and the report of a run that came to its end."""


def no_report(directory: Path) -> None:
    """Of a run that wants none."""


@dataclass(kw_only=True)
class Record:
    """Writes into ``directory``; ``make_report`` makes its page, or nothing, when all else is written."""

    directory: RunDirectory
    metrics: Metrics
    stragglers: Stragglers
    make_report: Callable[[Path], Path | None] = no_report
    _progress: Progress | None = field(default=None, init=False)
    # what is said when training is over
    _closing: list[str] = field(default_factory=list, init=False)
    # the rows that a remark is made of
    _last: list[Mapping[str, float]] = field(default_factory=list, init=False)

    def truncate_to(self, metrics: int, ranks: int) -> None:
        self.metrics.truncate_to(metrics)
        self.stragglers.truncate_to(ranks)
        truncate_rows(self.directory.search, ranks)

    @contextmanager
    def open(self, num_iterations: int, first: int, max_seconds: float) -> Iterator[None]:
        self._progress = Progress(
            num_iterations, first=first, max_seconds=max_seconds, num_compilations=num_compilations
        )
        # what an earlier attempt came to is no more true
        self.directory.summary.unlink(missing_ok=True)
        try:
            with self.metrics, self._progress:
                if first == 0:
                    self._progress.say("evaluating before training")
                yield
        except Preempted:
            raise
        except Exception as error:
            self.metrics.finish(" ".join(f"{type(error).__name__}: {error}".split()))
            raise
        finally:
            # below the live line, which is there no more
            print(*self._closing, sep="\n", end="\n" * bool(self._closing), flush=True)

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
        self.metrics.scores(iteration, result.scores)
        totals = self.metrics.totals_of(result.scores, len(result.images))
        self.metrics.evaluation_grid(iteration, result.images, result.texts, result.verified, totals)
        save_gallery(self.directory.images, iteration, result)

    def search(self, iteration: int, texts: Sequence[str], noise: Noise, rewards: Rewards) -> None:
        row = search_row(iteration, texts, noise.scored, noise.estimates_PG, rewards.total_PG)
        if row is not None:
            append_row(self.directory.search, row)

    def finish(self) -> None:
        summary = self.metrics.finish()
        table = self.stragglers.table()
        said = self._report(summary["iterations"])
        self._closing = [*([table] if table else []), *closing_words(summary, self.directory), *said]

    def _report(self, iteration: int) -> list[str]:
        """Make the page; what is to be said of it, if anything."""
        try:
            if (page := self.make_report(self.directory.path)) is not None:
                self.metrics.page(iteration, "report", page)
        except Exception as error:
            # a run does not fail when all is done but its page
            why = " ".join(f"{type(error).__name__}: {error}".split())
            return [f"no report was made ({why}); fastgrpo report run={self.directory.path} tries again"]
        return []


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

    def search(self, iteration: int, texts: Sequence[str], noise: Noise, rewards: Rewards) -> None:
        pass

    def finish(self) -> None:
        pass
