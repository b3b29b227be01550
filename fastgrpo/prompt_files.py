"""Prompt files as people have them: a row is a text and whatever else its file says of it.

    .txt              one prompt a line
    .jsonl .ndjson    one object, or one string, a line
    .json             a list of objects or strings, or an object in which one value is such a list
    .csv .tsv         a line of column names, then one prompt a line

UTF-8, with or without a byte order mark; lines end in LF, CRLF or CR, and blank ones at the end count for nothing.
The prompt is the column ``prompt`` (or ``prompts``), else ``text`` or ``caption`` (or several of them), in capitals or
not; all others are the row's own.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgrpo.prompt_tables import Table, comma_separated, tab_separated

# the first of these that a file has
_USUAL = (("prompt", "prompts"), ("text", "texts", "caption", "captions"))
_LINES = re.compile(r"\r\n|\r|\n")
_MOST_COLUMNS_NAMED = 12


@dataclass(frozen=True)
class Row:
    """``place`` is the config's key, the file and the line, for whoever has to mend it."""

    place: str
    text: str
    others: Mapping[str, Any]


@dataclass(frozen=True)
class PromptFile:
    """``column`` is where the texts are from; None where a row is nothing but its text."""

    rows: list[Row]
    column: str | None


def read_prompt_file(path: Path, key: str, column: str = "") -> PromptFile:
    """The rows of a file; texts are as they stand there.  ``column`` '' is the one of a usual name.

    ValueError, with the line and the remedy, for what cannot be read.  ``key`` is the config's key of the file.
    """
    content = _content(path, key)
    read = _FORMATS.get(path.suffix.lower())
    if read is None:
        raise ValueError(
            f"{key}={path} ends in {path.suffix!r}, which says of no format that is known; name it by what it is: "
            f"{', '.join(_FORMATS)}"
        )
    where = f"{key}: {path}"
    found = read(_decoded(content, where), where)
    if not found:
        raise ValueError(f"{key}={path} is empty; write one prompt a line")
    return _rows(found, column, f"{key}={path}")


def read_prompt_list(values: Sequence[str | Mapping[str, Any]], key: str, column: str = "") -> PromptFile:
    """The same of a list, whose entries are texts, or mappings of plain values; ``key`` is what it stands for."""
    return _rows(plain_rows(values, key), column, f"{key}: the list that was given")


def plain_rows(values: Sequence[str | Mapping[str, Any]], key: str) -> Table:
    """The place of each entry, and what a file would have of it; ValueError for what no file could have."""
    if isinstance(values, str):
        raise ValueError(f"prompts are a list of texts, got the text {values!r}; write [{values!r}]")
    rows: Table = []
    for number, value in enumerate(values, start=1):
        place = f"{key}: row {number}"
        if not isinstance(value, str | Mapping):
            raise ValueError(f"{place} of the list is {value!r}; give a text, or a mapping as a .jsonl file has")
        try:
            rows.append((place, json.loads(json.dumps(value if isinstance(value, str) else dict(value)))))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{place} cannot be written as JSON ({error}); give plain values") from error
    if not rows:
        raise ValueError(f"{key}: the list that was given is empty; give at least one prompt")
    return rows


def _rows(found: Table, column: str, where: str) -> PromptFile:
    tables = [value for _, value in found if isinstance(value, dict)]
    named = _column(tables, column, where) if tables else None
    return PromptFile([_row(place, value, named or "") for place, value in found], named)


def _content(path: Path, key: str) -> bytes:
    try:
        return path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except FileNotFoundError as error:
        looked_for = "" if path.is_absolute() else f" (it was looked for as {path.absolute()})"
        raise ValueError(f"prompt file {path} does not exist; check {key}{looked_for}") from error
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{key}={path} cannot be read ({why}); give a readable text file") from error


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        *before, line = re.split(rb"\r\n|\r|\n", content[: error.start])
        raise ValueError(
            f"{where}:{len(before) + 1}: byte {len(line) + 1} of this line is not UTF-8; save the file as UTF-8"
        ) from error


def _lines(content: str) -> list[str]:
    """Without blank ones at the end."""
    lines = _LINES.split(content)
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def _text(content: str, where: str) -> Table:
    return list(_numbered(content, where))


def _numbered(content: str, where: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(_lines(content), start=1):
        yield f"{where}:{number}", line


def _json_lines(content: str, where: str) -> Table:
    return [(place, _parsed(line, place) if line.strip() else "") for place, line in _numbered(content, where)]


def _parsed(line: str, place: str) -> str | dict[str, Any]:
    remedy = 'write one {"prompt": "..."} object a line'
    try:
        value = json.loads(line, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not valid JSON ({error}); {remedy}") from error
    if not isinstance(value, str | dict):
        raise ValueError(f"{place}: a {_kind(value)}; {remedy}")
    return value


def _json(content: str, where: str) -> Table:
    try:
        value = json.loads(content, parse_constant=_constant) if content.strip() else []
    except (ValueError, RecursionError) as error:
        # many files of this name have a line of JSON for each row
        remedy = "name it .jsonl, which has one object a line" if _is_json_lines(content) else "mend it there"
        raise ValueError(f"{where}: not valid JSON ({error}); {remedy}") from error
    if isinstance(value, dict):
        lists = [name for name, child in value.items() if isinstance(child, list)]
        if len(lists) != 1:
            said = f"the lists {', '.join(lists)}" if lists else "no list"
            raise ValueError(f"{where}: an object with {said}; write a list of prompts, or an object with one in it")
        value = value[lists[0]]
    if not isinstance(value, list):
        raise ValueError(f"{where}: a {_kind(value)}; write a list of prompts, or an object with one in it")
    places = [f"{where}: entry {number}" for number in range(1, len(value) + 1)]
    for place, entry in zip(places, value, strict=True):
        if not isinstance(entry, str | dict):
            raise ValueError(f'{place}: a {_kind(entry)}; write a string or a {{"prompt": "..."}} object')
    return list(zip(places, value, strict=True))


def _is_json_lines(content: str) -> bool:
    try:
        return isinstance(json.loads(_lines(content)[0]), dict)
    except (ValueError, RecursionError):
        return False


def _constant(name: str) -> None:
    """NaN is what pandas writes for a value that is missing; JSON knows no numbers that are not finite."""
    if name != "NaN":
        raise ValueError(f"{name} is no number of JSON")


def _kind(value: Any) -> str:
    return {list: "list", dict: "object", str: "string", bool: "truth value", type(None): "null"}.get(
        type(value), "number"
    )


def _column(tables: Iterable[Mapping[str, Any]], wanted: str, where: str) -> str:
    """The column of the texts: the one that is wanted, or the only one of a usual name."""
    columns = list(dict.fromkeys(name for table in tables for name in table))
    shown = ", ".join(map(repr, columns[:_MOST_COLUMNS_NAMED])) + ", ..." * (len(columns) > _MOST_COLUMNS_NAMED)
    if wanted:
        if wanted not in columns:
            raise ValueError(f"{where} has no column prompts.column={wanted}; its columns are {shown}")
        return wanted
    for usual in _USUAL:
        found = [name for name in columns if name.strip().lower() in usual]
        if len(found) > 1:
            raise ValueError(f"{where} has several columns of prompts: {', '.join(found)}; choose by prompts.column=")
        if found:
            return found[0]
    raise ValueError(
        f"{where} has no column named prompt, text or caption; its columns are {shown}: choose one by prompts.column="
    )


def _row(place: str, value: str | dict[str, Any], column: str) -> Row:
    if isinstance(value, str):
        return Row(place, value, {})
    text = value.get(column)
    if not isinstance(text, str):
        said = f"{column!r} is a {_kind(text)}" if column in value else f"no {column!r}"
        raise ValueError(f"{place}: {said}; give every row its prompt as a string")
    return Row(place, text, {name: child for name, child in value.items() if name != column})


_FORMATS: dict[str, Callable[[str, str], Table]] = {
    ".txt": _text,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": comma_separated,
    ".tsv": tab_separated,
}
