"""Prompt order is a function of the seed alone; a bad prompt file is refused with its line and the remedy."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgrpo.prompts import MAX_CHARACTERS, PromptSource, load_prompts
from fastgrpo.resolution import Resolution
from fastgrpo.types import Prompt

A = Prompt("a")
SOURCES = st.tuples(st.integers(1, 12), st.integers(1, 9), st.integers(0, 2**40))


def source_of(num_prompts: int, prompts_per_iteration: int, seed: int) -> PromptSource:
    return PromptSource([Prompt(f"prompt {index}") for index in range(num_prompts)], prompts_per_iteration, seed)


def texts_of(path: str | Path) -> list[str]:
    return [prompt.text for prompt in load_prompts(path)]


@settings(max_examples=50, deadline=None)
@given(SOURCES)
def test_each_epoch_is_a_permutation_of_all_prompts(sizes: tuple[int, int, int]) -> None:
    num_prompts, prompts_per_iteration, _ = sizes
    source = source_of(*sizes)
    iterations = -(-3 * num_prompts // prompts_per_iteration)
    texts = [text for iteration in range(iterations) for text in source.at(iteration).texts]
    for epoch in range(3):
        assert sorted(texts[epoch * num_prompts : (epoch + 1) * num_prompts]) == sorted(source.texts)


@settings(max_examples=50, deadline=None)
@given(SOURCES, st.integers(0, 10**6))
def test_an_iteration_does_not_depend_on_what_was_asked_before(sizes: tuple[int, int, int], iteration: int) -> None:
    walked = source_of(*sizes)
    for earlier in range(5):
        walked.at(earlier)
    prompts = walked.at(iteration)
    assert prompts == source_of(*sizes).at(iteration)
    assert prompts.ids == [iteration * sizes[1] + p for p in range(sizes[1])]


@given(st.integers(1, 10), st.integers(0, 20))
def test_the_occurrence_decides_the_prompt_however_iterations_are_cut(num_prompts: int, seed: int) -> None:
    whole = source_of(num_prompts, 12, seed).at(0)
    parts = [source_of(num_prompts, 3, seed).at(iteration) for iteration in range(4)]
    assert whole.texts == [text for part in parts for text in part.texts]
    assert whole.ids == [index for part in parts for index in part.ids]


def test_seed_and_epoch_change_the_order() -> None:
    orders = {tuple(source_of(20, 20, seed).at(epoch).texts) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_the_order_of_a_seed_is_the_same_on_every_machine() -> None:
    assert [text[-1] for text in source_of(5, 5, 42).at(0).texts] == ["4", "2", "3", "1", "0"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(([A], 0, 1), "prompts_per_iteration"), (([A], 1, -1), "seed"), (([], 1, 0), "at least one prompt")],
)
def test_bad_settings_are_refused(arguments: tuple[list[Prompt], int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptSource(*arguments)


TALL, WIDE = Resolution(64, 32), Resolution(32, 64)
BUCKETS = st.lists(st.sampled_from([None, TALL, WIDE]), min_size=1, max_size=12)


def bucketed(resolutions: list[Resolution | None], prompts_per_iteration: int, seed: int) -> PromptSource:
    prompts = [Prompt(f"prompt {index}", resolution) for index, resolution in enumerate(resolutions)]
    return PromptSource(prompts, prompts_per_iteration, seed)


def test_the_order_of_buckets_is_the_one_computed_by_hand() -> None:
    source = PromptSource([Prompt("a0"), Prompt("b0", WIDE), Prompt("a1"), Prompt("a2")], 2, seed=42)
    # rounds of 3 visits to the first bucket and 1 to the other; by default_rng((42, round, 1000)) they are at
    # .644 / 3 = .215, .548, .881 and at .874; in the next round at .910 / 3 = .303, .637, .970 and at .382
    visited = [source.at(iteration) for iteration in range(8)]
    assert [prompts.resolution for prompts in visited] == [None, None, WIDE, None, None, WIDE, None, None]
    # by default_rng((42, epoch)) the first bucket's epochs are 2 1 0, 0 2 1, 0 1 2
    assert " ".join(text for prompts in visited[:5] for text in prompts.texts) == "a2 a1 a0 a0 b0 b0 a2 a1 a0 a1"
    assert [prompts.ids for prompts in visited[:3]] == [[0, 1], [2, 3], [4, 5]]


@settings(max_examples=100, deadline=None)
@given(BUCKETS, st.integers(1, 5), st.integers(0, 2**40))
def test_each_bucket_is_passed_through_in_permutations_and_as_often_as_it_has_prompts(
    resolutions: list[Resolution | None], prompts_per_iteration: int, seed: int
) -> None:
    source = bucketed(resolutions, prompts_per_iteration, seed)
    resolution_of = {prompt.text: prompt.resolution for prompt in source.prompts}
    seen: dict[Resolution | None, list[str]] = {resolution: [] for resolution in resolutions}
    for iteration in range(2 * len(resolutions)):
        prompts = source.at(iteration)
        assert {resolution_of[text] for text in prompts.texts} == {prompts.resolution}
        seen[prompts.resolution] += prompts.texts
        for resolution, texts in seen.items():
            share = resolutions.count(resolution) / len(resolutions)
            visits = len(texts) // prompts_per_iteration
            # a bucket's visits are off by less than one at any time of the round, and the time by one for each bucket
            assert abs(visits - share * (iteration + 1)) < 1 + share * len(seen)
    for resolution, texts in seen.items():
        own = sorted(text for text in resolution_of if resolution_of[text] == resolution)
        # rounds in whole numbers
        assert len(texts) == 2 * len(own) * prompts_per_iteration
        for first in range(0, len(texts), len(own)):
            assert sorted(texts[first : first + len(own)]) == own


@settings(max_examples=50, deadline=None)
@given(BUCKETS, st.integers(0, 2**40), st.integers(0, 10**6))
def test_the_bucket_of_an_iteration_does_not_depend_on_what_was_asked_before(
    resolutions: list[Resolution | None], seed: int, iteration: int
) -> None:
    walked = bucketed(resolutions, 3, seed)
    for earlier in range(5):
        walked.at(earlier)
    prompts = walked.at(iteration)
    # by another function of the seed in between
    bucketed(resolutions, 3, seed + 1).at(iteration)
    assert prompts == bucketed(resolutions, 3, seed).at(iteration)
    assert prompts.ids == [3 * iteration + p for p in range(3)]


def test_the_seed_changes_the_order_of_buckets_and_buckets_have_orders_of_their_own() -> None:
    def visited(seed: int) -> list[Resolution | None]:
        return [bucketed([None, TALL] * 5, 1, seed).at(iteration).resolution for iteration in range(10)]

    assert len({tuple(visited(seed)) for seed in range(5)}) > 3
    assert all(visited(seed).count(TALL) == 5 for seed in range(5))
    source = bucketed([None] * 20 + [TALL] * 20, 20, seed=0)
    first, second = ([int(text.split()[1]) % 20 for text in source.at(iteration).texts] for iteration in range(2))
    assert first != second


def test_rows_may_ask_for_a_resolution(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "a"}, {"prompt": "b", "resolution": 64}, {"prompt": "c", "resolution": [32, 64]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_prompts(path) == [Prompt("a"), Prompt("b", Resolution(64, 64)), Prompt("c", WIDE)]
    # as a model whose own resolution it is has it
    fitted = load_prompts(path, fit=lambda prompt: replace(prompt, resolution=None) if "c" in prompt.text else prompt)
    assert [prompt.resolution for prompt in fitted] == [None, Resolution(64, 64), None]


def test_more_resolutions_than_are_compiled_for_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    rows = [json.dumps({"prompt": "a", "resolution": 16 * side}) for side in range(1, 9)]
    path.write_text("\n".join(rows))
    assert len(load_prompts(path)) == 8
    path.write_text("\n".join([*rows, '{"prompt": "a"}']))
    with pytest.raises(ValueError, match=r"^prompts\.held_out=.*p.*s\.jsonl has 9 resolutions; use at most 8"):
        load_prompts(path, "prompts.held_out")


def test_text_files_give_one_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa red circle\r\n  zwei grüne Kreise \n{not json}".encode())
    assert texts_of(path) == ["a red circle", "zwei grüne Kreise", "{not json}"]


def test_jsonl_files_give_the_prompt_of_each_object(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    rows = [{"tag": "counting", "prompt": "two cats"}, {"prompt": "une pomme \u2028 bleue"}]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert texts_of(str(path)) == ["two cats", "une pomme \u2028 bleue"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"", "is empty; write one prompt a line"),
        ("p.txt", b"good\n\nthird\n", r"p\.txt:2: blank prompt; remove the line"),
        ("p.txt", b"good\n  \t\nthird", r"p\.txt:2: blank prompt"),
        ("p.txt", b"good\nb\xff\n", r"p\.txt:2: byte 2 of this line is not UTF-8; save the file as UTF-8"),
        ("p.txt", b"a\0b\n", r"p\.txt:1: holds a NUL"),
        ("p.txt", b"a\n" + b"x" * (MAX_CHARACTERS + 1), rf"p\.txt:2: .* shorten it to at most {MAX_CHARACTERS}"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "b"\n', r"p\.jsonl:2: not valid JSON .* write one"),
        ("p.jsonl", b"[" * 100_000, r"p\.jsonl:1: not valid JSON"),
        (
            "p.jsonl",
            b'{"name": "a"}\n',
            r"p\.jsonl has no column named prompt, text or caption; its columns are 'name'",
        ),
        ("p.jsonl", b'{"prompt": 3}\n', r"p\.jsonl:1: 'prompt' is a number; give every row its prompt as a string"),
        ("p.jsonl", b'["a"]\n', r"p\.jsonl:1: a list; write one"),
        ("p.jsonl", b'{"prompt": " "}\n', r"p\.jsonl:1: blank prompt"),
        ("p.jsonl", b'{"prompt": "\\ud800"}\n', r"p\.jsonl:1: half of a surrogate pair"),
        *(
            (
                "p.jsonl",
                b'{"prompt": "a"}\n{"prompt": "b", "resolution": %s}\n' % value.encode(),
                r"p\.jsonl:2: resolution must be a whole number or \[height, width\], got",
            )
            for value in ("null", '"64 x 64"', "64.0", "true", "[64]", "[64, 64, 64]", '["64", 64]', "{}")
        ),
    ],
)
def test_a_bad_prompt_file_is_refused_with_line_and_remedy(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_prompts(tmp_path / name)


def test_a_missing_file_and_a_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.txt does not exist; check prompts\.path$"):
        load_prompts(tmp_path / "none.txt")
    with pytest.raises(ValueError, match=r"cannot be read .* give a readable text file"):
        load_prompts(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [("none.txt", None), ("empty.txt", b""), ("blank.txt", b"good\n\nthird"), ("", None), (".", None)],
)
def test_what_is_wrong_with_a_file_is_told_by_the_key_it_came_from(
    name: str, content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).write_bytes(content)
    for key, other in (("prompts.held_out", "prompts.path"), ("prompts.path", "prompts.held_out")):
        with pytest.raises(ValueError, match=key.replace(".", r"\.")) as raised:
            load_prompts(name, key=key)
        assert other not in str(raised.value)


def test_where_a_relative_path_was_looked_for_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"does not exist; check prompts\.path \(it was looked for as {tmp_path}/no"):
        load_prompts("nowhere.txt")


def test_a_file_in_the_home_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.txt").write_text("a red circle\n")
    assert texts_of("~/mine.txt") == ["a red circle"]
