"""Conditions on disk: a text goes through the encoders once, whichever runs and processes want it.

    path = directory / encoders / SHA-256(text).safetensors    one row: embeddings [1, L, C], pooled [1, C], length [1]

``encoders`` is a hash of all that a row depends on but its text (``fastgrpo.models.encoder_identity``).  A file carries
the SHA-256 of its tensors and appears by one rename: processes may share a directory, and a damaged file is encoded
again.
Letters: B texts, L text tokens, C width of an embedding.
"""

import hashlib
import logging
import os
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fastgrpo.files.private_directory import check_own, make_private
from fastgrpo.on_device import on_device
from fastgrpo.types import Conditions

_log = logging.getLogger(__name__)
_KEY = "model.condition_cache"
_TENSORS = ("embeds_BLC", "pooled_BC", "lengths_B")


@dataclass(frozen=True, kw_only=True)
class ConditionCache:
    """``get(texts)`` are their conditions on ``device``; ``directory`` None keeps them in memory alone.

    encode: is given the different texts that are nowhere yet, never none, and yields one row [1, ...] a text in their
    order.  A generator that moves the encoders to the device first and away at its end does so only where it is needed.
    encoders: all that a row depends on but its text.
    memory_bytes: of rows that stay on the device; those longest unused leave first.
    """

    encode: Callable[[Sequence[str]], Iterable[Conditions]]
    encoders: str
    directory: Path | None
    device: torch.device
    memory_bytes: int = 2**29
    _rows: OrderedDict[str, Conditions] = field(default_factory=OrderedDict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.directory is not None:
            make_private(self.directory, _KEY)
            make_private(self.directory / self.encoders, _KEY)

    def get(self, texts: Sequence[str]) -> Conditions:
        """One row a text, filled up with zeros to the longest of them.

        What is not filled is the same bit for bit whichever texts come with it, and wherever it comes from.
        """
        rows = {text: row for text in dict.fromkeys(texts) if (row := self._find(text)) is not None}
        for text, row, _ in self._encode([text for text in dict.fromkeys(texts) if text not in rows]):
            rows[text] = row
        for text, row in rows.items():
            self._remember(text, row)
        first, *others = [rows[text] for text in texts]
        return first.cat(*others)

    def lacks(self, text: str) -> bool:
        """Whether the directory has no row of the text, or a damaged one."""
        return self._read(text) is None

    def absent(self, texts: Iterable[str]) -> list[str]:
        """Those of the different texts that have no file in the directory, where there is one; files are not read."""
        if self.directory is None:
            return []
        return [text for text in dict.fromkeys(texts) if not self._path(text).exists()]

    def prepare(self, texts: Iterable[str]) -> Iterator[int]:
        """Put the rows of texts that are lacking into the directory; yields the bytes of each file that it wrote."""
        for _, _, num_bytes in self._encode(list(dict.fromkeys(texts))):
            yield num_bytes

    def _find(self, text: str) -> Conditions | None:
        if (row := self._rows.get(text)) is not None:
            return row
        row = self._read(text)
        return None if row is None else self._keyed(text, row)

    def _encode(self, texts: list[str]) -> Iterator[tuple[str, Conditions, int]]:
        if texts:
            for text, row in zip(texts, self.encode(texts), strict=True):
                yield text, self._keyed(text, row), self._write(text, row)

    def _keyed(self, text: str, row: Conditions) -> Conditions:
        key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
        return replace(row.map(lambda part: on_device(part, self.device)), keys=(key,))

    def _remember(self, text: str, row: Conditions) -> None:
        self._rows[text] = row
        self._rows.move_to_end(text)
        while len(self._rows) > 1 and sum(row.num_bytes for row in self._rows.values()) > self.memory_bytes:
            self._rows.popitem(last=False)

    def _path(self, text: str) -> Path:
        assert self.directory is not None
        return self.directory / self.encoders / f"{hashlib.sha256(text.encode()).hexdigest()}.safetensors"

    def _read(self, text: str) -> Conditions | None:
        """The row on the CPU, or None if there is none or it is damaged; ValueError if it may be another's."""
        if self.directory is None:
            return None
        path = self._path(text)
        if not path.exists() and not path.is_symlink():
            return None
        check_own(path, _KEY)
        try:
            with safe_open(path, framework="pt") as file:
                row = Conditions(
                    file.get_tensor("embeds_BLC"), file.get_tensor("pooled_BC"), lengths_B=file.get_tensor("lengths_B")
                )
                intact = file.metadata() == self._facts(text, row)
        except (SafetensorError, OSError) as error:
            _log.warning("%s cannot be read (%s); its text is encoded again", path, error)
            return None
        if not intact:
            _log.warning("%s is damaged; its text is encoded again", path)
            return None
        return row

    def _write(self, text: str, row: Conditions) -> int:
        """The bytes of the file that now holds the row; 0 without a directory."""
        if self.directory is None:
            return 0
        path, row = self._path(text), row.to("cpu")
        tensors = {name: getattr(row, name).contiguous() for name in _TENSORS}
        try:
            descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".temporary_")
            os.close(descriptor)
            try:
                # without fsync: a file that a crash of the machine cut short is found by its hash
                save_file(tensors, temporary, self._facts(text, row))
                os.replace(temporary, path)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{path} cannot be written ({error}); set {_KEY} to another directory, or to null"
            ) from error
        return path.stat().st_size

    def _facts(self, text: str, row: Conditions) -> dict[str, str]:
        digest = hashlib.sha256()
        for x in (getattr(row, name) for name in _TENSORS):
            digest.update(f"{x.dtype} {tuple(x.shape)} ".encode())
            digest.update(x.contiguous().flatten().view(torch.uint8).numpy().data)
        return {"text": text, "encoders": self.encoders, "sha256": digest.hexdigest()}
