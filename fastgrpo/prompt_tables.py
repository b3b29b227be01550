"""Tables of prompts: .csv and .tsv, whose first line names the columns.

A .csv is quoted as RFC 4180 has it, and so is a .tsv that is well-formed by it.  Other .tsv files have a quote wherever
a text has one (PartiPrompts: ``"G I G G L E" painted in thick letters``): there a field alone is quoted that begins and
ends with a quote and doubles those inside it.
"""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any

_LINES = re.compile(r"\r\n|\r|\n")
# a row by its columns, '' for a blank line, and where it stands
Table = list[tuple[str, str | dict[str, Any]]]


def comma_separated(content: str, where: str) -> Table:
    """The rows of a .csv; ``where`` is what comes before the number of a line."""
    try:
        return _table(_quoted_fields(content, ","), where)
    except _Malformed as error:
        raise ValueError(
            f"{where}:{error.line}: {error}; put a text with commas or quotes in quotes, and double the quotes in it"
        ) from error


def tab_separated(content: str, where: str) -> Table:
    """The rows of a .tsv."""
    try:
        records = _quoted_fields(content, "\t")
        width = len(records[0][1]) if records else 0
        # a quote that opens by chance, and closes lines later, takes tabs along
        is_quoted = all(len(fields) <= width and not _spans_fields(fields) for _, fields in records)
    except _Malformed:
        is_quoted = False
    if not is_quoted:
        lines = enumerate(_LINES.split(content), start=1)
        records = [(number, [_unquoted(field) for field in line.split("\t")]) for number, line in lines]
    return _table(records, where)


class _Malformed(ValueError):
    def __init__(self, line: int, said: str) -> None:
        super().__init__(said)
        self.line = line


def _quoted_fields(content: str, delimiter: str) -> list[tuple[int, list[str]]]:
    """The records and the line that each begins on."""
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    records: list[tuple[int, list[str]]] = []
    line = 1
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise _Malformed(line, str(error)) from error
        if fields is None:
            return records
        records.append((line, fields))
        line = reader.line_num + 1


def _spans_fields(fields: Iterable[str]) -> bool:
    return any("\t" in field and _LINES.search(field) for field in fields)


def _unquoted(field: str) -> str:
    inside = field.strip()[1:-1].replace('""', "")
    is_quoted = len(field.strip()) > 1 and field.strip()[0] == field.strip()[-1] == '"' and '"' not in inside
    return field.strip()[1:-1].replace('""', '"') if is_quoted else field


def _table(records: Sequence[tuple[int, list[str]]], where: str) -> Table:
    """One mapping a record, by the first one's names; those without a name, as pandas' index, are left out."""
    records = list(records)
    while records and not any(field.strip() for field in records[-1][1]):
        records.pop()
    if not records:
        return []
    (number, header), *others = records
    names = [name.strip() for name in header]
    if twice := sorted({name for name in names if name and names.count(name) > 1}):
        raise ValueError(f"{where}:{number}: several columns are named {', '.join(twice)}; give each a name of its own")
    found: Table = []
    for number, fields in others:
        if any(field.strip() for field in fields[len(names) :]):
            raise ValueError(
                f"{where}:{number}: {len(fields)} fields, and the first line names {len(names)} columns; quote a text "
                "in which the separator stands"
            )
        # some programs leave out empty fields at the end of a line
        row = {name: field for name, field in zip_longest(names, fields[: len(names)], fillvalue="") if name}
        # a blank line
        found.append((f"{where}:{number}", row if any(field.strip() for field in fields) else ""))
    if not found:
        raise ValueError(f"{where}:{number}: a line of column names and no prompt; write one prompt a line below it")
    return found
