"""Qwen3-VL's processor for text alone: the whole one prepares videos too, for which it needs torchvision."""

import shutil
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin, Qwen3VLProcessor


class TextProcessor(Qwen3VLProcessor):
    """Chat template and tokenizer of a directory; saved, it is all that the directory holds."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
        # not its own parent's, which wants to know images
        ProcessorMixin.__init__(self, tokenizer, chat_template=tokenizer.chat_template)
        # of a type that its description can hold
        self.directory = str(directory)

    @classmethod
    def of(cls, directory: Path) -> "TextProcessor":
        return cls(AutoTokenizer.from_pretrained(directory), directory)

    def __call__(self, text: str | list[str], **settings: Any) -> BatchFeature:
        # as one of several kinds of input has it
        return super().__call__(text=[text] if isinstance(text, str) else text, **settings)

    def save_pretrained(self, save_directory: str, **_: Any) -> None:
        if Path(save_directory).resolve() != Path(self.directory).resolve():
            shutil.copytree(self.directory, save_directory, dirs_exist_ok=True)
