"""A figure: a sentence, the result file that it is from, and the value that is read there."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from benchmarks.report import RESULTS

# counted: on a device that computes nothing; modelled: from bytes, FLOPs and constants; neither is a measurement
Kind = Literal["measured", "counted", "modelled"]


@dataclass(frozen=True)
class Figure:
    """``result`` is a file's name in results/, without its suffix; ``read`` gives the value, as text, of its JSON."""

    what: str
    result: str
    read: Callable[[dict[str, Any]], str]
    kind: Kind = "measured"

    @cached_property
    def data(self) -> dict[str, Any]:
        data: dict[str, Any] = json.loads((RESULTS / f"{self.result}.json").read_text())
        return data

    @property
    def value(self) -> str:
        return self.read(self.data)

    @property
    def commit(self) -> str:
        """Of the code that was measured: the last part of the file's name."""
        return self.result.rsplit("_", 1)[1]

    @property
    def device(self) -> str:
        """What computed, or was modelled."""
        if self.kind != "measured":
            return f"{self.kind}, {'H100' if self.kind == 'modelled' else 'no device'}"
        # earlier results say it beside the rest of the hardware
        processor = self.data["hardware"].get("cpu") or self.data["cpu"]
        return f"CPU, {processor.partition(' (')[0]}"
