"""Which groups are made again, and which images samples keep: values by hand."""

import pytest
import torch

from fastgrpo.algorithm.retries import Retries

# none right, one right, all right, none alike, and all alike above success
TOTAL_PG = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-2.0, -1.0], [-1.0, -1.0], [0.25, 0.25]])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0, 4]),
        ({"success": 0.25}, [0, 4, 5]),
        ({"success": -0.5}, [4]),
        ({"where": "below"}, [0, 3, 4]),
        ({"where": "everywhere"}, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_which_groups_are_made_again(settings: dict, expected: list[int]) -> None:
    assert Retries(**settings).groups(TOTAL_PG) == expected


def test_samples_keep_the_first_of_equal_images() -> None:
    old_SG, new_SG = torch.tensor([[0.0, 1.0, 0.5, 0.5]]), torch.tensor([[1.0, 0.0, 0.5, 0.75]])
    assert Retries().prefers(new_SG, old_SG).tolist() == [[True, False, False, True]]
    # the first half the better ones, the other half the worse ones
    assert Retries(keep="contrast").prefers(new_SG, old_SG).tolist() == [[True, False, False, False]]
    assert Retries(keep="contrast").prefers(old_SG, new_SG).tolist() == [[False, True, False, True]]


def test_a_sample_of_each_attempt_is_another_row() -> None:
    retries = Retries(tries=2)
    rows = [retries.row(row, 4, attempt) for attempt in range(3) for row in range(8)]
    assert len(set(rows)) == 24
    # sample 1 of prompt 1, in its second further attempt: of 12 samples of the prompt that at place 2 * 4 + 1
    assert retries.row(5, 4, 2) == 12 + 9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tries": 0}, r"noise\.tries must be at least 1, got 0; use algorithm/noise=gaussian"),
        ({"tries": 5000}, r"noise\.tries must be at most \d+, got 5000"),
        ({"candidates": 0}, r"noise\.candidates must be at least 1, got 0"),
        ({"success": float("nan")}, r"noise\.success must be finite, got nan"),
        ({"where": "nowhere"}, r"noise\.where must be one of no_success, below, everywhere, got 'nowhere'"),
        ({"keep": "all"}, r"noise\.keep must be one of best, contrast, got 'all'"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Retries(**settings)
