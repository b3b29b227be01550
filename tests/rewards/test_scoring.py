"""What a reward raises: what may pass is asked again, and a mistake stops the run at once with its line."""

import http.client
import inspect
import time

import pytest
import requests
import torch
from torch import Tensor

from fastgrpo.device_error import is_device_error
from fastgrpo.rewards.jpeg import JpegSize
from fastgrpo.rewards.reward import RewardError, RewardUnavailable
from fastgrpo.rewards.scoring import Scoring
from fastgrpo.rewards.shapes import ShapesReward

IMAGES = torch.zeros(3, 3, 4, 4)
MAY_PASS = [
    ConnectionRefusedError("refused"),
    TimeoutError("too late"),
    OSError(28, "No space left on device"),
    requests.exceptions.ReadTimeout("too late"),
    http.client.IncompleteRead(b""),
    RewardUnavailable("the judge is loading"),
]
MISTAKES = [
    NameError("name 'imags' is not defined"),
    AttributeError("no such"),
    TypeError("unsupported"),
    KeyError("score"),
    IndexError("out of range"),
    ValueError("shapes differ"),
    ZeroDivisionError("division by zero"),
    AssertionError("never"),
    NotImplementedError("later"),
    RuntimeError("The size of tensor a (3) must match"),
    RecursionError("too deep"),
]


DEVICE_ERRORS = [
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
]


class Raises:
    """Raises ``error`` the first ``times`` times."""

    def __init__(self, error: Exception, times: int) -> None:
        self.error, self.times, self.calls = error, times, 0

    def __call__(self, images_BCHW: Tensor, prompts: list[str]) -> Tensor:
        self.calls += 1
        if self.calls <= self.times:
            raise self.error
        return torch.ones(len(images_BCHW))


def ask(reward: Raises, **settings: float) -> Tensor:
    return Scoring(**{"retry_seconds": 0.0, **settings})("mine", reward, IMAGES, ["a"] * 3)  # type: ignore[arg-type]


def names(errors: list[Exception]) -> list[str]:
    return [type(error).__name__ for error in errors]


@pytest.mark.parametrize("error", MAY_PASS, ids=names(MAY_PASS))
def test_what_may_pass_is_asked_again(error: Exception) -> None:
    reward = Raises(error, times=2)
    assert ask(reward, retries=2).tolist() == [1, 1, 1]
    assert reward.calls == 3


@pytest.mark.parametrize("error", MAY_PASS, ids=names(MAY_PASS))
def test_what_does_not_pass_in_the_end_is_told_with_the_key(error: Exception) -> None:
    reward = Raises(error, times=9)
    with pytest.raises(
        RewardError, match=r"'mine' raised .*, 2 times on the same 3 images; .*reward\.scoring\.retries"
    ):
        ask(reward, retries=1)
    assert reward.calls == 2


@pytest.mark.parametrize("error", MISTAKES, ids=names(MISTAKES))
def test_a_mistake_is_told_at_once_with_the_line_of_the_users_file(error: Exception) -> None:
    reward = Raises(error, times=9)
    lines, first = inspect.getsourcelines(Raises.__call__)
    line = first + next(row for row, text in enumerate(lines) if "raise self.error" in text)
    begun = time.monotonic()
    with pytest.raises(RewardError) as raised:
        ask(reward, retries=5, retry_seconds=10.0)
    assert time.monotonic() - begun < 5
    assert reward.calls == 1
    assert str(raised.value).startswith(f"reward 'mine' raised {type(error).__name__}: {error}, at ")
    assert f"test_scoring.py, line {line}; correct it there" in str(raised.value)
    assert raised.value.__cause__ is error


@pytest.mark.parametrize("error", DEVICE_ERRORS, ids=str)
def test_a_gpu_that_has_failed_is_not_asked_again_and_no_reward_is_blamed(error: Exception) -> None:
    reward = Raises(error, times=9)
    with pytest.raises(type(error)) as raised:
        ask(reward, retries=5, retry_seconds=10.0)
    assert raised.value is error
    assert reward.calls == 1


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("The size of tensor a (3) must match"),
        # calls that were refused, after which the next one is answered
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasGemmEx(...)`"),
        torch.AcceleratorError("CUDA error: invalid configuration argument"),
        ConnectionResetError("CUDA error: said by another machine"),
    ],
    ids=str,
)
def test_what_is_too_large_or_a_mistake_is_no_failure_of_a_gpu(error: Exception) -> None:
    assert not is_device_error(error)


def test_the_line_is_the_users_also_where_a_library_raises() -> None:
    def mistaken(images_BCHW: Tensor, prompts: list[str]) -> Tensor:
        return JpegSize()(images_BCHW[:, :, 0], prompts)

    line = inspect.getsourcelines(mistaken)[1] + 1
    with pytest.raises(RewardError, match=rf"'mine' raised \w+: .*, at .*test_scoring\.py, line {line}; "):
        Scoring()("mine", mistaken, IMAGES, ["a"] * 3)


def test_a_piece_of_the_package_says_itself_what_to_do() -> None:
    with pytest.raises(RewardError) as raised:
        Scoring()("shapes", ShapesReward(), IMAGES, ["a red circle"] * 3)
    assert str(raised.value) == (
        "reward 'shapes' raised ValueError: reward=shapes verifies images [3, 64, 64], got [3, 4, 4]; use model=shapes "
        "with it, or another reward"
    )
