"""What a reward may answer: one number an image in whatever a user has them in, and nothing else."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fastgrpo.rewards.answers import as_rewards
from fastgrpo.rewards.reward import RewardError
from fastgrpo.rewards.scoring import Scoring
from fastgrpo.rewards.weighted_sum import Rewards

CPU = torch.device("cpu")
VALUES = [0.0, 1.0, -2.5, 1e6]
IMAGES = torch.zeros(4, 3, 2, 2)
GOOD: dict[str, Any] = {
    "list": VALUES,
    "tuple": tuple(VALUES),
    "list of numbers of numpy": [np.float32(value) for value in VALUES],
    "list of tensors": [torch.tensor(value) for value in VALUES],
    "list of tensors of one": [torch.tensor([value], dtype=torch.float64) for value in VALUES],
    "array": np.array(VALUES),
    "array of float32": np.array(VALUES, dtype=np.float32),
    "array of the other byte order": np.array(VALUES, dtype=">f8"),
    "array backwards": np.array(VALUES[::-1])[::-1],
    "tensor": torch.tensor(VALUES),
    "tensor of float64": torch.tensor(VALUES, dtype=torch.float64),
    "tensor of gradient": torch.tensor(VALUES, requires_grad=True),
}
WHOLE: dict[str, Any] = {
    "list of int": [3, 0, -1, 2],
    "array of int": np.array([3, 0, -1, 2]),
    "tensor of int": torch.tensor([3, 0, -1, 2]),
}
TRUTH: dict[str, Any] = {
    "list": [True, False, False, True],
    "list of numpy": list(np.array([True, False, False, True])),
    "array": np.array([True, False, False, True]),
    "tensor": torch.tensor([True, False, False, True]),
}
BAD: dict[str, tuple[Any, str]] = {
    "nothing": (None, "None"),
    "one number": (0.5, "0.5"),
    "too few": (VALUES[:3], "a list of 3"),
    "too many": ((*VALUES, 1.0), "a tuple of 5"),
    "strings": (["0.5"] * 4, "'0.5' for image 0"),
    "one string": ("0.5", "'0.5'"),
    "a None": ([0.0, 1.0, None, 1.0], "None for image 2"),
    "lists": ([[0.0]] * 4, "a list for image 0"),
    "tensors of two": ([torch.zeros(2)] * 4, r"a tensor \[2\] of float32 for image 0"),
    "complex": ([1j] * 4, "a complex for image 0"),
    "dict": (dict.fromkeys(range(4), 0.0), "a dict"),
    "array too short": (np.zeros(3), r"shape \[3\]"),
    "array of columns": (np.zeros((4, 1)), r"shape \[4, 1\]"),
    "array of objects": (np.array([0.0, None, 0.0, 0.0]), "an array of object"),
    "array of strings": (np.array(["a"] * 4), "an array of <U1"),
    "tensor too long": (torch.zeros(5), r"shape \[5\]"),
    "tensor of columns": (torch.zeros(4, 1), r"shape \[4, 1\]"),
    "tensor of one number": (torch.tensor(0.0), r"shape \[\]"),
    "complex tensor": (torch.zeros(4, dtype=torch.complex64), r"a tensor of torch\.complex64"),
}


def asked(answer: Any) -> torch.Tensor:
    return Scoring()("mine", lambda images, prompts: answer, IMAGES, ["a"] * 4)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        *((answer, VALUES) for answer in GOOD.values()),
        *((answer, [3.0, 0.0, -1.0, 2.0]) for answer in WHOLE.values()),
        *((answer, [1.0, 0.0, 0.0, 1.0]) for answer in TRUTH.values()),
    ],
    ids=[*GOOD, *WHOLE, *(f"{name} of bool" for name in TRUTH)],
)
def test_numbers_are_taken_in_whatever_they_come(answer: Any, expected: list[float]) -> None:
    found_B = asked(answer)
    assert found_B.dtype == torch.float32
    assert found_B.tolist() == expected
    assert not found_B.requires_grad


@pytest.mark.parametrize(("answer", "shown"), BAD.values(), ids=BAD)
def test_what_is_not_one_number_an_image_is_refused_by_the_rewards_name(answer: Any, shown: str) -> None:
    with pytest.raises(
        RewardError, match=rf"reward 'mine' answered {shown} for 4 images; return one number an image: a tensor \[4\]"
    ):
        asked(answer)


@pytest.mark.parametrize("make", [list, np.array, torch.tensor], ids=["list", "array", "tensor"])
@pytest.mark.parametrize(("value", "shown"), [(float("nan"), "nan"), (float("inf"), "inf"), (1e39, "inf")])
def test_what_is_not_finite_in_float32_is_refused(make: Callable[..., Any], value: float, shown: str) -> None:
    rewards = Rewards(terms={"mine": lambda images, prompts: make([0.0, value, 0.0, 0.0])}, weights={"mine": 1.0})
    with pytest.raises(RewardError, match=rf"reward 'mine' answered {shown} for image 1 \('a'\)"):
        rewards(IMAGES, ["a"])


def test_an_integer_beyond_all_floats_is_refused() -> None:
    with pytest.raises(RewardError, match="reward 'mine' raised OverflowError: int too large"):
        asked([10**400, 1, 1, 1])


@pytest.mark.parametrize("answer", [VALUES, np.array(VALUES), torch.tensor(VALUES)], ids=["list", "array", "tensor"])
def test_answers_move_to_where_the_images_are(answer: Any) -> None:
    elsewhere = as_rewards("mine", answer, 4, torch.device("meta"))
    assert (elsewhere.device.type, elsewhere.dtype, elsewhere.shape) == ("meta", torch.float32, (4,))


@pytest.mark.gpu
@pytest.mark.parametrize("answer", [VALUES, np.array(VALUES), torch.tensor(VALUES)], ids=["list", "array", "tensor"])
def test_a_reward_may_answer_on_the_cpu_for_images_on_a_gpu(answer: Any) -> None:
    rewards = Rewards(terms={"mine": lambda images, prompts: answer}, weights={"mine": 2.0})
    total_PG = rewards(IMAGES.cuda(), ["a"]).total_PG
    assert total_PG.is_cuda
    assert total_PG.tolist() == [[2 * value for value in VALUES]]
