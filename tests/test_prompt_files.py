"""Prompt files as people have them: each format's own style, its oddities, and rows that come back as they were."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgrpo.prompt_files import read_prompt_file
from fastgrpo.prompts import load_prompts, longest, texts_to_encode
from fastgrpo.resolution import Resolution
from fastgrpo.types import Prompt

# by hand, in the style of each file: quotes as they come, an empty last field, a text in quotes at its beginning
PARTI = (
    "Prompt\tCategory\tChallenge\tNote\n"
    "bond\tAbstract\tBasic\tConcepts with several meanings\n"
    'a logo of a club called "The Wanderers"\tWorld Knowledge\tImagination\t\n'
    '"G I G G L E" in thick letters, as graffiti\tIllustrations\tWriting & Symbols\t\n'
    '7 dogs around a table\tAnimals\tQuantity\tAfter "Dogs at Cards"\n'
)
DRAWBENCH = (
    "Prompts,Category\r\n"
    "A red colored car.,Colors\r\n"
    '"A blue bird, and a brown bear.",Conflicting\r\n'
    '"A storefront with ""Hello"" written on it.",Text\r\n'
)
GENEVAL = (
    '{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}\n'
    '{"tag": "counting", "include": [{"class": "cow", "count": 2}], "exclude": [{"class": "cow", "count": 3}], '
    '"prompt": "a photo of two cows"}\n'
)
COCO = '{"info": {"year": 2014}, "annotations": [{"id": 7, "caption": "A bowl."}, {"id": 9, "caption": "Two cats."}]}'


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows_of(path: Path, column: str = "") -> list[tuple[str, dict[str, Any]]]:
    return [(prompt.text, dict(prompt.metadata)) for prompt in load_prompts(path, column=column)]


def test_parti_prompts_have_quotes_where_their_texts_have_them(tmp_path: Path) -> None:
    assert rows_of(write(tmp_path / "p.tsv", PARTI)) == [
        ("bond", {"Category": "Abstract", "Challenge": "Basic", "Note": "Concepts with several meanings"}),
        (
            'a logo of a club called "The Wanderers"',
            {"Category": "World Knowledge", "Challenge": "Imagination", "Note": ""},
        ),
        (
            '"G I G G L E" in thick letters, as graffiti',
            {"Category": "Illustrations", "Challenge": "Writing & Symbols", "Note": ""},
        ),
        ("7 dogs around a table", {"Category": "Animals", "Challenge": "Quantity", "Note": 'After "Dogs at Cards"'}),
    ]


def test_a_tsv_that_is_quoted_in_places_is_read_by_field(tmp_path: Path) -> None:
    content = 'prompt\ttag\n"a ""big"" dog"\tx\n"Hi" on a wall\ty\n"opens\tz\ncloses"\tz\n'
    found = rows_of(write(tmp_path / "p.tsv", content))
    assert [text for text, _ in found] == ['a "big" dog', '"Hi" on a wall', '"opens', 'closes"']
    # well-formed all through, with a line break in a text
    found = rows_of(write(tmp_path / "q.tsv", 'prompt\ttag\n"a\n""b"""\tx\nc "d"\ty\n'))
    assert found == [('a\n"b"', {"tag": "x"}), ('c "d"', {"tag": "y"})]
    # a quote that opens by chance and is closed two lines later by another
    found = rows_of(write(tmp_path / "r.tsv", 'prompt\ttag\n"Tis a dog\tx\na cat\ty\nthe cat\'s"\tz\n'))
    assert [(text, said["tag"]) for text, said in found] == [('"Tis a dog', "x"), ("a cat", "y"), ("the cat's\"", "z")]


def test_draw_bench_has_commas_and_quotes_in_quotes(tmp_path: Path) -> None:
    assert rows_of(write(tmp_path / "DrawBench.CSV", DRAWBENCH)) == [
        ("A red colored car.", {"Category": "Colors"}),
        ("A blue bird, and a brown bear.", {"Category": "Conflicting"}),
        ('A storefront with "Hello" written on it.', {"Category": "Text"}),
    ]


@pytest.mark.parametrize("name", ["p.jsonl", "p.ndjson", "P.JSONL"])
def test_geneval_keeps_what_its_evaluator_reads(name: str, tmp_path: Path) -> None:
    single, counting = load_prompts(write(tmp_path / name, GENEVAL))
    assert (single.text, counting.text) == ("a photo of a bench", "a photo of two cows")
    assert single.metadata == {"tag": "single_object", "include": [{"class": "bench", "count": 1}]}
    assert counting.metadata["exclude"] == [{"class": "cow", "count": 3}]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('["a", "b"]', [("a", {}), ("b", {})]),
        ('[{"TEXT": "a", "x": 1}, {"TEXT": "b"}]', [("a", {"x": 1}), ("b", {})]),
        ('{"version": 2, "prompts": ["a", {"prompt": "b", "x": null}]}', [("a", {}), ("b", {"x": None})]),
        (COCO, [("A bowl.", {"id": 7}), ("Two cats.", {"id": 9})]),
        # as pandas writes what is missing
        ('[{"prompt": "a", "x": NaN}]', [("a", {"x": None})]),
    ],
)
def test_json_is_a_list_or_has_one_list(content: str, expected: Any, tmp_path: Path) -> None:
    assert rows_of(write(tmp_path / "p.json", content)) == expected


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("p.txt", ["a b", "c"]),
        ("p.jsonl", ['{"prompt": "a b"}', '"c"']),
        ("p.csv", ["caption,n", '"a b",1', "c,2"]),
        ("p.tsv", ["n\tPROMPT", "1\ta b", "2\tc"]),
        ("p.json", ["[", '"a b",', '"c"', "]"]),
    ],
)
def test_line_ends_a_byte_order_mark_and_blank_lines_at_the_end_are_no_prompts(
    name: str, lines: list[str], end: str, tmp_path: Path
) -> None:
    for mark in ("", "\ufeff"):
        for tail in ("", end, end * 3, f"{end}  {end}"):
            content = mark + end.join(lines) + tail
            assert [text for text, _ in rows_of(write(tmp_path / name, content))] == ["a b", "c"], repr(content)


def test_spreadsheets_write_empty_rows_and_an_index_without_a_name(tmp_path: Path) -> None:
    assert rows_of(write(tmp_path / "p.csv", ",prompt,n,\n0,a,1,\n1,b\n,,,\n,,,\n")) == [
        ("a", {"n": "1"}),
        ("b", {"n": ""}),
    ]


def _csv(rows: list[dict[str, str]], delimiter: str, quoting: Any) -> str:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, ["kind", "Prompt", "note"], delimiter=delimiter, quoting=quoting)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


WRITERS: dict[str, Callable[[list[dict[str, str]]], str]] = {
    "a.csv": lambda rows: _csv(rows, ",", csv.QUOTE_MINIMAL),
    "b.csv": lambda rows: _csv(rows, ",", csv.QUOTE_ALL),
    "a.tsv": lambda rows: _csv(rows, "\t", csv.QUOTE_MINIMAL),
    "a.json": json.dumps,
    "b.json": lambda rows: json.dumps({"prompts": rows}, ensure_ascii=False, indent=2),
    "a.jsonl": lambda rows: "\n".join(map(json.dumps, rows)),
}
# no control characters, which csv takes for line ends, nor halves of surrogate pairs
TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12).map(lambda text: text.strip())
ROWS = st.lists(st.fixed_dictionaries({"kind": TEXTS, "Prompt": TEXTS.filter(bool), "note": TEXTS}), min_size=1)


@pytest.mark.parametrize("name", WRITERS)
@settings(max_examples=60, deadline=None)
@given(rows=ROWS)
def test_rows_come_back_from_each_format_as_they_were(
    name: str, rows: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = write(tmp_path_factory.mktemp("rows") / name, WRITERS[name](rows))
    assert rows_of(path) == [(row["Prompt"], {"kind": row["kind"], "note": row["note"]}) for row in rows]


@settings(max_examples=60, deadline=None)
@given(rows=ROWS)
def test_rows_of_a_tsv_that_nobody_quoted_come_back(
    rows: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    # a text in quotes as a whole looks as if it were quoted
    texts = [row["Prompt"] for row in rows if not row["Prompt"].startswith('"') or not row["Prompt"].endswith('"')]
    lines = ["Prompt\tkind", '"odd" one\tx', *(f"{text}\tx" for text in texts)]
    path = write(tmp_path_factory.mktemp("rows") / "p.tsv", "\n".join(lines))
    assert [text for text, _ in rows_of(path)] == ['"odd" one', *texts]


def test_the_column_is_the_usual_one_or_the_one_that_is_chosen(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", '{"text": "OPEN", "Prompt": "a sign", "caption": "c"}')
    assert read_prompt_file(path, "prompts.path").column == "Prompt"
    assert rows_of(path) == [("a sign", {"text": "OPEN", "caption": "c"})]
    assert rows_of(path, "caption") == [("c", {"text": "OPEN", "Prompt": "a sign"})]
    # a file without columns has no other to choose
    assert rows_of(write(tmp_path / "p.txt", "a"), "caption") == [("a", {})]


@pytest.mark.parametrize(
    ("name", "content", "column", "message"),
    [
        ("p.parquet", "PAR1", "", r"p\.parquet ends in '\.parquet', .* name it by what it is: \.txt, \.jsonl"),
        ("prompts", "a", "", r"ends in '', which says of no format"),
        ("p.csv", "a,b\n1,2\n", "", r"no column named prompt, text or caption; its columns are 'a', 'b': choose one"),
        ("p.csv", "a,b\n1,2\n", "c", r"has no column prompts\.column=c; its columns are 'a', 'b'"),
        ("p.csv", "Text,caption\n1,2\n", "", r"several columns of prompts: Text, caption; choose by prompts\.column="),
        ("p.csv", "prompt,prompt\n1,2\n", "", r"p\.csv:1: several columns are named prompt"),
        ("p.csv", "prompt\n", "", r"p\.csv:1: a line of column names and no prompt"),
        ("p.csv", "prompt,n\na, b, 1\n", "", r"p\.csv:2: 3 fields, and the first line names 2 columns; quote a text"),
        ("p.csv", 'prompt,n\n"A" b,1\n', "", r"p\.csv:2: ',' expected after '\"'; put a text"),
        ("p.csv", 'prompt,n\na,1\n\n"b\n\n,1\n', "", r"p\.csv:4: unexpected end of data; put a text"),
        ("p.csv", 'prompt\n"a\nb"\n\nc\n', "", r"p\.csv:4: blank prompt"),
        ("p.tsv", "prompt\ta\nx\ty\tz\n", "", r"p\.tsv:2: 3 fields, and the first line names 2 columns"),
        ("p.csv", "n,prompt\n1\n", "", r"p\.csv:2: blank prompt"),
        ("p.csv", b"prompt\r\na\r\n\xff\r\n", "", r"p\.csv:3: byte 1 of this line is not UTF-8"),
        ("p.json", '{"a": ["x"], "b": ["y"]}', "", r"p\.json: an object with the lists a, b; write a list"),
        ("p.json", '{"a": "x"}', "", r"p\.json: an object with no list"),
        ("p.json", "3", "", r"p\.json: a number; write a list"),
        ("p.json", '["x", 3]', "", r"p\.json: entry 2: a number; write a string"),
        ("p.json", '["x", " "]', "", r"p\.json: entry 2: blank prompt"),
        ("p.json", "[]", "", r"p\.json is empty"),
        ("p.json", "", "", r"p\.json is empty"),
        ("p.json", '{"prompt": "a"}\n{"prompt": "b"}\n', "", r"not valid JSON .* name it \.jsonl, which has one"),
        ("p.json", '["a",', "", r"p\.json: not valid JSON .* mend it there"),
        ("p.jsonl", '{"prompt": "a", "x": Infinity}', "", r"p\.jsonl:1: not valid JSON \(Infinity is no number"),
        ("p.jsonl", '{"prompt": "a"}\n{"Prompt": "b"}', "", r"several columns of prompts: prompt, Prompt"),
        ("p.jsonl", '{"prompt": "a"}\n{"x": "b"}', "", r"p\.jsonl:2: no 'prompt'"),
        ("p.jsonl", '{"prompt": "a", "negative_prompt": 3}', "", r"p\.jsonl:1: negative_prompt is 3; write a string"),
        (
            "p.jsonl",
            '{"prompt": "a", "negative_prompt": "b", "Negative Prompt": "c"}',
            "",
            r"p\.jsonl:1: several negative prompts",
        ),
    ],
)
def test_what_cannot_be_read_is_told_by_its_place(
    name: str, content: str | bytes, column: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        load_prompts(write(tmp_path / name, content), column=column)
    assert str(raised.value).startswith("prompts.path")


def test_a_table_has_resolutions_and_negative_prompts_in_some_rows(tmp_path: Path) -> None:
    path = write(
        tmp_path / "p.csv",
        'prompt,resolution,Negative Prompt,tag\na,64,,x\nb,"[32, 64]",blurry,y\nc,, ,z\n',
    )
    assert load_prompts(path) == [
        Prompt("a", Resolution(64, 64), {"tag": "x"}),
        Prompt("b", Resolution(32, 64), {"tag": "y"}, "blurry"),
        Prompt("c", None, {"tag": "z"}),
    ]


def test_rows_of_one_text_and_other_metadata_are_not_one_row() -> None:
    one, other = (Prompt("a", metadata={"n": [n]}) for n in (1, 2))
    assert one != other
    assert len({one, other, Prompt("a", metadata={"n": [1]})}) == 2


def test_what_is_encoded_has_each_text_of_both_branches_once() -> None:
    prompts = [Prompt("a", negative="x"), Prompt("bbb"), Prompt("a", negative="yy"), Prompt("x")]
    assert texts_to_encode(prompts) == ["a", "x", "bbb", "yy"]
    assert longest(prompts) == Prompt("bbb", negative="yy")
