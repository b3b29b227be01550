"""A report read back, by Python's own HTML parser: texts, references to elsewhere, and the numbers of its plots."""

import base64
import gzip
import html
import json
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

_VOID = {"meta", "img", "input", "br", "link"}


@dataclass
class Page(HTMLParser):
    """Texts by the tag that is around them, and every attribute that could load something."""

    path: Path
    texts: dict[str, list[str]] = field(default_factory=dict)
    loads: list[tuple[str, str]] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    _open: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.text = self.path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in _VOID:
            self._open.append(tag)
        loading = ("src", "href", "srcset", "data", "action", "poster")
        self.loads += [(name, value or "") for name, value in attrs if name in loading]
        assert not any(name.startswith("on") for name, _ in attrs), attrs

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts.setdefault(self._open[-1], []).append(data)

    def all_of(self, tag: str) -> list[str]:
        """The texts in all elements of a tag, blanks made one."""
        return [" ".join(text.split()) for text in self.texts.get(tag, []) if text.strip()]

    @property
    def data(self) -> dict[str, Any]:
        """What the page's script reads."""
        found: dict[str, Any] = json.loads(re.search(r'id="data">(.*?)</script>', self.text, re.S)[1])  # type: ignore[index]
        return found

    def sources(self) -> dict[str, dict[str, Any]]:
        """The columns of each named source of the plots."""
        return {name: columns for name, columns in self.all_sources() if name}

    def all_sources(self) -> list[tuple[str, dict[str, Any]]]:
        """Name and columns of each source of the plots, in their order."""
        text = re.search(r"const docs_json = '(.*?)';\n", self.text, re.S)[1]  # type: ignore[index]
        models = json.loads(html.unescape(text.replace("\\\\", "\\").replace("\\'", "'")))
        return [(one["attributes"].get("name", ""), _columns(one)) for one in _models(models)]


def _models(node: Any) -> list[dict[str, Any]]:
    if isinstance(node, dict):
        own = [node] if node.get("name") == "ColumnDataSource" and "attributes" in node else []
        return own + [model for child in node.values() for model in _models(child)]
    return [model for child in node for model in _models(child)] if isinstance(node, list) else []


def _columns(source: dict[str, Any]) -> dict[str, Any]:
    return {name: _values(values) for name, values in source["attributes"]["data"]["entries"]}


def _values(values: Any) -> Any:
    if isinstance(values, dict) and values.get("type") == "ndarray":
        raw = gzip.decompress(base64.b64decode(values["array"]["data"]))
        return np.frombuffer(raw, dtype=values["dtype"]).tolist()
    return values
