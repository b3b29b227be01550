"""The fixtures of all tests leave the process as they found it."""

from collections.abc import Iterator

import pytest
import torch


def tf32() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.fixture
def as_it_was() -> Iterator[tuple[bool, bool]]:
    """Asked for before ``float32_is_exact``, so that it looks after that one has ended."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    yield tf32()
    assert tf32() == (True, True)
    torch.backends.cuda.matmul.allow_tf32 = False


def test_float32_is_exact_within_a_test_and_what_it_was_after(
    as_it_was: tuple[bool, bool], float32_is_exact: None
) -> None:
    assert as_it_was == (True, True)
    assert tf32() == (False, False)
