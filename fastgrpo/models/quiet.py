"""What diffusers and transformers print while they load, and nobody needs to read."""

from diffusers.utils import logging as diffusers_logging
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from transformers.utils import logging as transformers_logging


def hide_loading_bars() -> None:
    """Turn off the progress bars of reading and writing weights; those of downloads stay as they are."""
    downloads_shown = not are_progress_bars_disabled()
    diffusers_logging.disable_progress_bar()
    # this one turns off those of downloads as well
    transformers_logging.disable_progress_bar()
    if downloads_shown:
        enable_progress_bars()
