"""Remarks that libraries make on every start and that mean nothing here; all their others still show."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_KNOWN = (
    ("transformers.utils.import_utils", "requires torchvision"),
    # a pipeline without T5 has no third text encoder to save
    ("diffusers.pipelines.pipeline_utils", "cannot be saved"),
)


@dataclass(frozen=True)
class _Lacks:
    """A filter of a logger."""

    remark: str

    def __call__(self, record: logging.LogRecord) -> bool:
        return self.remark not in record.getMessage()


def hide_known_warnings() -> None:
    """From here to the end of the process, or to the end of ``known_warnings_hidden``."""
    for logger, remark in _KNOWN:
        logging.getLogger(logger).addFilter(_Lacks(remark))


@contextmanager
def known_warnings_hidden() -> Iterator[None]:
    """Inside, these are hidden; afterwards each logger has the filters that it had."""
    loggers = [logging.getLogger(name) for name, _ in _KNOWN]
    before = [list(logger.filters) for logger in loggers]
    hide_known_warnings()
    try:
        yield
    finally:
        for logger, filters in zip(loggers, before, strict=True):
            logger.filters = filters
