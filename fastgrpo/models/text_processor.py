"""Qwen3-VL's processor for text alone: the whole one prepares videos too, for which it needs torchvision."""

import shutil
from pathlib import Path
from textwrap import shorten
from typing import Any

from transformers import AutoTokenizer, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin, Qwen3VLProcessor

_MIN_VOCABULARY = 32
_MAX_QUOTED = 200


class TextProcessor(Qwen3VLProcessor):
    """Chat template and tokenizer of a directory; saved, it is all that the directory holds."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
        # not its own parent's, which wants to know images
        ProcessorMixin.__init__(self, tokenizer, chat_template=tokenizer.chat_template)
        # of a type that its description can hold
        self.directory = str(directory)

    @classmethod
    def of(cls, directory: Path) -> "TextProcessor":
        """ValueError for files that are missing or damaged."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(directory)
        except (OSError, ValueError) as error:
            reason = shorten(str(error), _MAX_QUOTED, placeholder=" ...")
            raise ValueError(f"model.weights: {directory} cannot be read ({reason}); download it again") from error
        # transformers makes one without words, without an error, where files are missing
        if len(tokenizer) < _MIN_VOCABULARY or not tokenizer.chat_template:
            raise ValueError(f"model.weights: {directory} lacks words or a chat template; download it again")
        return cls(tokenizer, directory)

    def __call__(self, text: str | list[str], **settings: Any) -> BatchFeature:
        # as one of several kinds of input has it
        return super().__call__(text=[text] if isinstance(text, str) else text, **settings)

    def save_pretrained(self, save_directory: str, **_: Any) -> None:
        if Path(save_directory).resolve() != Path(self.directory).resolve():
            shutil.copytree(self.directory, save_directory, dirs_exist_ok=True)
