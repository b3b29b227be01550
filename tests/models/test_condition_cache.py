"""A text is encoded once, its row is the same wherever it comes from, and a file that is not whole is never read."""

import multiprocessing
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from fastgrpo.models.condition_cache import ConditionCache
from fastgrpo.models.encoder_identity import encoder_identity
from fastgrpo.types import Conditions
from tests.tiny import PROMPTS

CPU = torch.device("cpu")


class Encoders:
    """Rows that are a function of the text alone, in bfloat16, and a record of what was asked."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.on_device = False

    def __call__(self, texts: Sequence[str]) -> Iterator[Conditions]:
        self.asked.append(list(texts))
        self.on_device = True
        for text in texts:
            generator = torch.Generator().manual_seed(len(text))
            yield Conditions(
                torch.randn(1, 5, 3, generator=generator).bfloat16(), torch.randn(1, 2, generator=generator).bfloat16()
            )
        self.on_device = False


def make_cache(directory: Path | None, encoders: Encoders, **fields: int) -> ConditionCache:
    return ConditionCache(encode=encoders, encoders="e" * 32, directory=directory, device=CPU, **fields)


def files_of(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


def assert_equal(a: Conditions, b: Conditions) -> None:
    assert torch.equal(a.embeds_BLC, b.embeds_BLC)
    assert torch.equal(a.pooled_BC, b.pooled_BC)
    assert a.embeds_BLC.dtype == b.embeds_BLC.dtype
    assert torch.equal(a.lengths_B, b.lengths_B)
    assert a.lengths_B.dtype == b.lengths_B.dtype == torch.int32
    assert a.keys == b.keys


def test_a_text_is_encoded_once_and_its_row_comes_back_from_disk_bit_for_bit(tmp_path: Path) -> None:
    first, second = Encoders(), Encoders()
    made = make_cache(tmp_path / "c", first).get(["a", "bb", "a"])
    assert first.asked == [["a", "bb"]]
    assert not first.on_device, "encoders that leave the device at the end of their generator have left it"
    assert_equal(make_cache(tmp_path / "c", second).get(["a", "bb", "a"]), made)
    assert second.asked == [], "encoders are not touched where every text is known"
    assert made.keys[0] == made.keys[2] != made.keys[1]
    (expected,) = Encoders()(["bb"])
    assert torch.equal(made.embeds_BLC[1:2], expected.embeds_BLC)


def test_only_the_texts_that_are_nowhere_are_encoded(tmp_path: Path) -> None:
    encoders = Encoders()
    cache = make_cache(tmp_path / "c", encoders)
    cache.get(["a", "bb"])
    cache.get(["ccc", "bb", "a", "dddd"])
    assert encoders.asked == [["a", "bb"], ["ccc", "dddd"]]


def test_a_row_of_a_real_pipeline_does_not_depend_on_the_texts_beside_it(tiny_weights: Path, tmp_path: Path) -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_weights, text_encoder_3=None, tokenizer_3=None)

    def encode(texts: Sequence[str]) -> Iterator[Conditions]:
        for text in texts:
            with torch.no_grad():
                embeds_BLC, _, pooled_BC, _ = pipeline.encode_prompt(
                    [text], None, None, do_classifier_free_guidance=False, max_sequence_length=8
                )
            yield Conditions(embeds_BLC, pooled_BC)

    identity = encoder_identity(tiny_weights, {"max_sequence_length": 8})
    together = ConditionCache(encode=encode, encoders=identity, directory=tmp_path / "c", device=CPU).get(PROMPTS)
    for place, text in enumerate(PROMPTS):
        alone = ConditionCache(encode=encode, encoders=identity, directory=None, device=CPU).get([text])
        assert_equal(alone, together[place : place + 1])
    again = ConditionCache(encode=encode, encoders=identity, directory=tmp_path / "c", device=CPU).get(PROMPTS)
    assert_equal(again, together)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "swap"])
def test_a_damaged_file_is_encoded_again(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    made = make_cache(tmp_path / "c", Encoders()).get(["a", "bb"])
    victim, other = files_of(tmp_path / "c")
    content = victim.read_bytes()
    if damage == "swap":
        shutil.copy(other, victim)
    else:
        flipped = content[:-1] + bytes([content[-1] ^ 1])
        victim.write_bytes({"flip": flipped, "cut": content[:-1], "empty": b""}[damage])
    encoders = Encoders()
    assert_equal(make_cache(tmp_path / "c", encoders).get(["a", "bb"]), made)
    assert len(encoders.asked[0]) == 1
    assert f"{victim}" in caplog.text
    assert "encoded again" in caplog.text
    repaired = Encoders()
    assert_equal(make_cache(tmp_path / "c", repaired).get(["a", "bb"]), made)
    assert repaired.asked == []


def test_processes_that_write_the_same_texts_at_once_leave_whole_files(tmp_path: Path) -> None:
    texts = [n * "x" for n in range(1, 30)]
    # forked, as spawned ones would import torch for seconds
    context = multiprocessing.get_context("fork")
    work = [context.Process(target=lambda: make_cache(tmp_path / "c", Encoders()).get(texts)) for _ in range(3)]
    for process in work:
        process.start()
    for process in work:
        process.join(60)
        assert process.exitcode == 0
    encoders = Encoders()
    assert_equal(make_cache(tmp_path / "c", encoders).get(texts), make_cache(None, Encoders()).get(texts))
    assert encoders.asked == []
    assert len(files_of(tmp_path / "c")) == len(texts)


def test_a_write_that_fails_leaves_nothing_and_names_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ValueError, match=r"No space left.*; set model\.condition_cache to another directory, or to nu"):
        make_cache(tmp_path / "c", Encoders()).get(["a"])
    assert files_of(tmp_path / "c") == []


def test_the_directory_is_for_its_user_alone_and_links_are_refused(tmp_path: Path) -> None:
    make_cache(tmp_path / "c", Encoders()).get(["a"])
    assert (tmp_path / "c").stat().st_mode & 0o777 == 0o700
    (tmp_path / "alias").symlink_to(tmp_path / "c")
    with pytest.raises(ValueError, match=r"alias is a link to .*set model\.condition_cache"):
        make_cache(tmp_path / "alias", Encoders())
    (file,) = files_of(tmp_path / "c")
    file.rename(tmp_path / "theirs")
    file.symlink_to(tmp_path / "theirs")
    with pytest.raises(ValueError, match=r"safetensors is a link to"):
        make_cache(tmp_path / "c", Encoders()).get(["a"])
    (tmp_path / "c").chmod(0o750)
    with pytest.raises(ValueError, match=r"has mode 750.*run chmod 700"):
        make_cache(tmp_path / "c", Encoders())


def test_rows_in_memory_stay_within_their_bytes_and_the_longest_unused_leaves_first() -> None:
    encoders = Encoders()
    # a row is (5 * 3 + 2) * 2 bytes, and 4 of its length
    cache = make_cache(None, encoders, memory_bytes=2 * 38)
    cache.get(["a", "bb"])
    cache.get(["a"])
    cache.get(["ccc"])
    cache.get(["a"])
    assert encoders.asked == [["a", "bb"], ["ccc"]]
    cache.get(["bb"])
    assert encoders.asked[2:] == [["bb"]]
    assert len(cache.get(["a", "bb", "ccc", "dddd"])) == 4, "more than fits is still answered"


def test_prepare_writes_what_lacks_and_says_its_bytes(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c", Encoders())
    cache.get(["a"])
    (had,) = files_of(tmp_path / "c")
    assert [cache.lacks(text) for text in ("a", "bb")] == [False, True]
    written = list(cache.prepare(["bb", "ccc", "bb"]))
    assert written == [path.stat().st_size for path in files_of(tmp_path / "c") if path != had]
    assert not any(cache.lacks(text) for text in ("a", "bb", "ccc"))


def test_an_interrupted_preparation_keeps_what_it_has(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c", Encoders())
    next(iter(cache.prepare(["a", "bb", "ccc"])))
    assert [cache.lacks(text) for text in ("a", "bb", "ccc")] == [False, True, True]


def test_the_identity_tells_encoders_apart_and_ignores_the_transformer(tiny_weights: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_weights, copy)
    identity = encoder_identity(tiny_weights, {"max_sequence_length": 8})
    assert encoder_identity(copy, {"max_sequence_length": 8}) == identity
    assert encoder_identity(copy, {"max_sequence_length": 9}) != identity
    (copy / "transformer" / "config.json").write_text("{}")
    assert encoder_identity(copy, {"max_sequence_length": 8}) == identity
    weights = copy / "text_encoder_2" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert encoder_identity(copy, {"max_sequence_length": 8}) != identity
    weights.write_bytes(content)
    next((copy / "tokenizer").iterdir()).unlink()
    assert encoder_identity(copy, {"max_sequence_length": 8}) != identity
    with pytest.raises(ValueError, match="has no text_encoder"):
        encoder_identity(copy / "vae", {})


def test_a_long_weight_file_is_told_by_pieces_of_its_begin_middle_and_end(tmp_path: Path) -> None:
    (tmp_path / "text_encoder").mkdir()
    weights = tmp_path / "text_encoder" / "model.safetensors"
    content = bytes(4_000_000)
    weights.write_bytes(content)
    identity = encoder_identity(tmp_path, {})
    for offset in (0, 2_000_000, 3_999_999):
        # weights that were trained differ over long stretches, not in one byte
        first = max(0, offset - 20_000)
        weights.write_bytes(content[:first] + bytes(b"\1" * (offset + 1 - first)) + content[offset + 1 :])
        assert encoder_identity(tmp_path, {}) != identity
