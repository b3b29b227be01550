"""A plain config as its keys in full, ``a.b.c``, and their values."""

from collections.abc import Iterator, Mapping
from typing import Any


def leaves(node: object, key: str = "") -> Iterator[tuple[str, Any]]:
    """Each key below ``node`` and its value; an empty mapping, and a list, is a value."""
    if isinstance(node, Mapping) and node:
        for name, child in node.items():
            yield from leaves(child, f"{key}.{name}" if key else str(name))
    else:
        yield key, node
