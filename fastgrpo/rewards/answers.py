"""What rewards answer: one finite number an image.  Letters: B images."""

import numbers
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgrpo.on_device import on_device
from fastgrpo.rewards.reward import RewardError

# of numpy's types: booleans, integers with and without sign, floats
_NUMBERS = "biuf"


def as_rewards(name: str, answer: Any, num_images: int, device: torch.device) -> Tensor:
    """The answer of the reward ``name`` as float32 [B] on ``device``.

    It may be a tensor [B] of real numbers wherever it lies, an array [B], or a list or tuple of B numbers or of tensors
    of one number.  RewardError for anything else.
    """
    if isinstance(answer, list | tuple):
        wrong = next((row for row, value in enumerate(answer) if not _is_number(value)), None)
        if wrong is not None:
            raise _refusal(name, f"{_shown(answer[wrong])} for image {wrong}", num_images)
        if len(answer) != num_images:
            raise _refusal(name, f"a {type(answer).__name__} of {len(answer)}", num_images)
        return on_device(torch.tensor([float(value) for value in answer], dtype=torch.float32), device)
    if isinstance(answer, np.ndarray):
        if answer.dtype.kind not in _NUMBERS:
            raise _refusal(name, f"an array of {answer.dtype}", num_images)
        # a copy in the machine's byte order, which a tensor needs
        answer = torch.from_numpy(answer.astype(np.float64))
    if not isinstance(answer, Tensor):
        raise _refusal(name, _shown(answer), num_images)
    if answer.is_complex():
        raise _refusal(name, f"a tensor of {answer.dtype}", num_images)
    if answer.shape != (num_images,):
        raise _refusal(name, f"shape {list(answer.shape)}", num_images)
    return on_device(answer.float(), device)


def check_finite(name: str, reward_B: Tensor, texts: list[str]) -> None:
    """RewardError, naming image and text, if an answer is NaN or infinite."""
    bad = (~torch.isfinite(reward_B)).nonzero().flatten().tolist()
    if bad:
        raise RewardError(
            f"reward {name!r} answered {reward_B[bad[0]].item()} for image {bad[0]} ({texts[bad[0]]!r}); {len(bad)} of "
            f"its {len(texts)} answers are not finite; let it return a finite number for every image"
        )


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, numbers.Real | np.bool_)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    return repr(value)[:40] if value is None or isinstance(value, str | int | float) else f"a {type(value).__name__}"


def _refusal(name: str, what: str, num_images: int) -> RewardError:
    return RewardError(
        f"reward {name!r} answered {what} for {num_images} images; return one number an image: a tensor [{num_images}],"
        f" or a list or array of {num_images} numbers"
    )
