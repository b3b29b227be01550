"""Conditions of unlike lengths in one batch: what fills them up, what is cut, and what stays a row's own."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgrpo.models.lora import LoRA
from fastgrpo.models.sd3 import StableDiffusion3
from fastgrpo.models.text_lengths import filled, filled_length, refuse_longer
from fastgrpo.types import Conditions


def row(num_tokens: int, key: int, length: int | None = None) -> Conditions:
    conditions = Conditions(torch.full((1, num_tokens, 2), float(key)), torch.full((1, 1), float(key)), (key,))
    return conditions if length is None else replace(conditions, lengths_B=torch.tensor([length], dtype=torch.int32))


def test_without_lengths_all_tokens_count() -> None:
    assert row(5, 1).lengths_B.tolist() == [5]
    assert row(5, 1).lengths_B.dtype == torch.int32


def test_rows_of_unlike_lengths_become_one_batch_and_keep_theirs() -> None:
    batch = row(2, 1).cat(row(4, 2, length=3), row(3, 3))
    assert batch.embeds_BLC[..., 0].tolist() == [[1, 1, 0, 0], [2, 2, 2, 2], [3, 3, 3, 0]]
    assert batch.lengths_B.tolist() == [2, 3, 3]
    assert batch.keys == (1, 2, 3)
    assert batch[1:].lengths_B.tolist() == [3, 3]
    assert batch.take([2, 0]).lengths_B.tolist() == [3, 2]
    assert batch.repeat(2).lengths_B.tolist() == [2, 2, 3, 3, 3, 3]
    assert batch.to("cpu").lengths_B.tolist() == [2, 3, 3]
    # floats [3, 4, 2] and [3, 1], and three numbers of 32 bits
    assert batch.num_bytes == 3 * 4 * 2 * 4 + 3 * 4 + 3 * 4


@pytest.mark.parametrize(
    ("num_tokens", "most", "length"), [(1, 512, 64), (64, 512, 64), (65, 512, 128), (300, 512, 512), (9, 32, 32)]
)
def test_texts_have_few_lengths(num_tokens: int, most: int, length: int) -> None:
    assert filled_length(num_tokens, most) == length
    found = filled(row(num_tokens, 7), most)
    assert found.embeds_BLC.shape == (1, length, 2)
    assert (found.embeds_BLC[0, :, 0] != 0).sum() == num_tokens == found.lengths_B.item()
    assert found.keys == (7,)


def test_a_text_that_is_too_long_is_refused_in_one_line() -> None:
    refuse_longer("a cat", 64, 64, 512)
    with pytest.raises(
        ValueError,
        match=r"^prompt 'a cat' is 65 tokens long with its chat template, and model\.max_sequence_length is 64; "
        r"shorten it, or raise model\.max_sequence_length, up to 512$",
    ):
        refuse_longer("a cat", 65, 64, 512)
    with pytest.raises(ValueError, match=r"prompt 'x{57}\.\.\.' is 600 tokens .* 512; shorten it$"):
        refuse_longer("x" * 100, 600, 512, 512)


def test_a_text_that_is_cut_is_one_line(tiny_weights: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings: dict[str, Any] = {"resolution": 32, "use_t5": False, "max_sequence_length": 0}
    model = StableDiffusion3(weights=str(tiny_weights), adaptation=LoRA(rank=2), **settings)
    words = "a red circle " * 20
    caplog.clear()
    model.encode(["a red circle", words])
    most = model.pipeline.tokenizer.model_max_length
    said = [record.getMessage() for record in caplog.records]
    # 60 words, a beginning and an end
    read = f"of which the first {most} are read (model.max_sequence_length)"
    assert said == [f"prompt {words[:57] + '...'!r} is 62 tokens long, {read}"]
