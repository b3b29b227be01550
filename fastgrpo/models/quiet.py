"""What diffusers and transformers print while they load, and nobody needs to read."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from diffusers.utils import logging as diffusers_logging
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging as transformers_logging


def hide_loading_bars() -> None:
    """Turn off the progress bars of reading and writing weights; those of downloads stay as they are."""
    downloads_shown = not are_progress_bars_disabled()
    diffusers_logging.disable_progress_bar()
    # this one turns off those of downloads as well
    transformers_logging.disable_progress_bar()
    if downloads_shown:
        enable_progress_bars()


@contextmanager
def loading_bars_hidden() -> Iterator[None]:
    """Inside, these are turned off; afterwards they are as they were."""
    downloads_shown = not are_progress_bars_disabled()
    ours = (diffusers_logging, transformers_logging)
    shown = [module for module in ours if module.is_progress_bar_enabled()]
    hide_loading_bars()
    try:
        yield
    finally:
        for module in shown:
            module.enable_progress_bar()
        (enable_progress_bars if downloads_shown else disable_progress_bars)()


@contextmanager
def errors_alone() -> Iterator[None]:
    """Inside, the two say nothing but errors: what they say of a text that is cut is several lines of it."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
