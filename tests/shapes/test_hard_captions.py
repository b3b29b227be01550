"""The sentences of the hard captions, and the prompt files that were chosen of them."""

import re
from collections import Counter

import pytest
from transformers import AutoTokenizer

from fastgrpo.files.locations import resolve_path
from fastgrpo.shapes.hard_captions import MAX_WORDS, hard_candidates, hard_captions, num_words
from fastgrpo.shapes.world import Caption, all_captions, parse_caption

RED, BLUE, GREEN = ("red", "circle"), ("blue", "square"), ("green", "triangle")


@pytest.mark.parametrize(
    ("text", "caption", "sizes", "form"),
    [
        ("a red circle", Caption((RED,)), (1,), "one object"),
        ("two red circles", Caption((RED,) * 2), (2,), "2 equal objects"),
        ("five red circles", Caption((RED,) * 5), (5,), "5 equal objects"),
        ("a red circle above a blue square", Caption((RED, BLUE), "above"), (1, 1), "above"),
        ("a red circle left of a red circle", Caption((RED, RED), "left of"), (1, 1), "left of"),
        (
            "two red circles left of three blue squares",
            Caption((RED,) * 2 + (BLUE,) * 3, "left of"),
            (2, 3),
            "two groups of 5 objects",
        ),
        (
            "a red circle above two blue squares",
            Caption((RED, BLUE, BLUE), "above"),
            (1, 2),
            "two groups of 3 objects",
        ),
        (
            "red circle left of blue square above green triangle",
            Caption((RED, BLUE, GREEN), "left of", "above"),
            (1, 1, 1),
            "chain of 3 objects",
        ),
        (
            "red circle above two blue squares left of red circle",
            Caption((RED, BLUE, BLUE, RED), "above", "left of"),
            (1, 2, 1),
            "chain of 4 objects",
        ),
    ],
)
def test_a_caption_is_what_its_sentence_says(text: str, caption: Caption, sizes: tuple[int, ...], form: str) -> None:
    assert parse_caption(text) == caption
    assert str(caption) == text
    assert caption.sizes == sizes
    assert caption.form == form


def test_every_caption_is_read_as_it_is_written() -> None:
    captions = [*all_captions(), *hard_candidates()]
    assert [parse_caption(str(caption)) for caption in captions] == captions


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("two red circle", id="plural"),
        pytest.param("a red circles", id="singular"),
        pytest.param("red circle", id="no article"),
        pytest.param("a red circle left of blue square", id="one article"),
        pytest.param("a red circle left of a blue square above a green triangle", id="a chain with articles"),
        pytest.param("three red circles left of four blue squares", id="seven objects"),
        pytest.param("two red circles left of three red circles", id="groups of one kind"),
        pytest.param("six red circles", id="no such count"),
        pytest.param("red circle above red square above red triangle above blue square", id="four groups"),
        pytest.param(" left of a red circle", id="no first group"),
        pytest.param("", id="nothing"),
    ],
)
def test_what_the_world_does_not_speak_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"cannot draw {re.escape(repr(text))}; write 'a red circle'"):
        parse_caption(text)


def test_the_shipped_model_reads_every_hard_caption_whole() -> None:
    tokenizer = AutoTokenizer.from_pretrained(resolve_path("pkg://fastgrpo.shapes/checkpoint/tokenizer"))
    assert tokenizer.model_max_length == MAX_WORDS + 2
    for caption in (*hard_candidates(), *(c for part in hard_captions() for c in part)):
        assert len(tokenizer(str(caption)).input_ids) == num_words(caption) + 2 <= tokenizer.model_max_length


def test_candidates_are_new_and_of_many_forms() -> None:
    candidates = hard_candidates()
    assert len(set(candidates)) == len(candidates)
    assert not set(candidates) & set(all_captions())
    forms = Counter(caption.form for caption in candidates)
    assert forms["4 equal objects"] == forms["5 equal objects"] == 12
    assert len(forms) == 9


def test_prompt_files_hold_new_sentences_of_every_form_apart() -> None:
    train, held_out = hard_captions()
    assert (len(train), len(held_out)) == (96, 32)
    assert len({*train, *held_out}) == 128
    assert {*train, *held_out} <= set(hard_candidates())
    assert {c.form for c in train} == {c.form for c in held_out}
    assert {len(c.kinds) for c in train} >= {3, 4, 5}
