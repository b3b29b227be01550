"""Images to the input of a vision transformer: antialiased bicubic resize, center crop, normalization, cast.

    resized = V image U^T, where V and U are the bicubic weights of the two axes
    output  = ((crop of resized - low) / (high - low) - mean) / std

"torch" computes it in float32.  "pil" repeats Pillow's bytes: the image is clamped to [low, high] and rounded to bytes,
each of the two passes, first along the rows, is rounded to bytes again, and the gradient is that of "torch".

A layout of images is read as it is.  Letters: B images, C channels, H, W inputs along the two axes.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fastgrpo_kernels.bicubic import bicubic_weights, resample, resampling_table, to_22_places
from fastgrpo_kernels.op import define_op


def _affine(low: float, high: float, mean: Sequence[float], std: Sequence[float], match: str) -> list[list[float]]:
    """[scale, shift] of each channel: from what was resized, bytes or the image's own values, to the output."""
    # one byte is 1/255 of the way from low to high
    low, high = (0.0, 255.0) if match == "pil" else (low, high)
    scale = [1 / ((high - low) * s) for s in std]
    return [scale, [-(low / (high - low) + m) / s for m, s in zip(mean, std, strict=True)]]


def _to_bytes(low: float, high: float) -> tuple[float, float]:
    return 255 / (high - low), -255 * low / (high - low)


def preprocess_images_reference(
    images: Tensor,
    resized: list[int],
    crop: list[int],
    low: float,
    high: float,
    mean: list[float],
    std: list[float],
    match: str,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """The operator on the CPU, and what the tests compare the kernel with."""
    x = images.float()
    if match == "pil":
        scale, shift = _to_bytes(low, high)
        x = (x * scale).add_(shift).clamp_(0, 255).round_()
    # along rows first
    for dim in (-1, -2):
        num_inputs, num_resized, num_outputs = x.shape[dim], resized[dim], crop[dim]
        if num_inputs == num_resized:
            x = x.narrow(dim, (num_resized - num_outputs) // 2, num_outputs)
            continue
        weights = bicubic_weights(num_inputs, num_resized, num_outputs).to(x.device)
        # float64 holds every sum of bytes times 22 binary places
        x, weights = (x.double(), to_22_places(weights)) if match == "pil" else (x, weights.float())
        x = x @ weights.mT if dim == -1 else weights @ x
        x = x.add_(0.5).floor_().clamp_(0, 255).float() if match == "pil" else x
    scale_C11, shift_C11 = (x.new_tensor(values)[:, None, None] for values in _affine(low, high, mean, std, match))
    return x.mul(scale_C11).add_(shift_C11).to(dtype, memory_format=_memory_format(channels_last))


def preprocess_images_backward_reference(
    grad: Tensor, size: list[int], resized: list[int], gain: list[float], dtype: torch.dtype, channels_last: bool
) -> Tensor:
    """The gradient of images of ``size``; gain is one factor a channel."""
    V, U = (
        bicubic_weights(*sizes).to(grad.device).float() for sizes in zip(size, resized, grad.shape[-2:], strict=True)
    )
    scaled = grad.float() * grad.new_tensor(gain, dtype=torch.float32)[:, None, None]
    return (V.mT @ (scaled @ U)).to(dtype, memory_format=_memory_format(channels_last))


def _memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _empty(x: Tensor, size: list[int], dtype: torch.dtype, channels_last: bool) -> Tensor:
    shape = (*x.shape[:2], *size)
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=_memory_format(channels_last))


def _preprocess_images_triton(
    images: Tensor,
    resized: list[int],
    crop: list[int],
    low: float,
    high: float,
    mean: list[float],
    std: list[float],
    match: str,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    rows, columns = (
        resampling_table(*sizes, match, False, images.device)
        for sizes in zip(images.shape[-2:], resized, crop, strict=True)
    )
    out = _empty(images, crop, dtype, channels_last)
    to_bytes = _to_bytes(low, high) if match == "pil" else None
    return resample(images, out, rows, columns, _affine(low, high, mean, std, match), to_bytes)


def _preprocess_images_fake(images: Tensor, resized: list[int], crop: list[int], *rest: Any) -> Tensor:
    *_, dtype, channels_last = rest
    return _empty(images, crop, dtype, channels_last)


def _preprocess_images_backward_triton(
    grad: Tensor, size: list[int], resized: list[int], gain: list[float], dtype: torch.dtype, channels_last: bool
) -> Tensor:
    rows, columns = (
        resampling_table(*sizes, "torch", True, grad.device)
        for sizes in zip(size, resized, grad.shape[-2:], strict=True)
    )
    out = _empty(grad, size, dtype, channels_last)
    return resample(grad, out, rows, columns, [gain, [0.0] * len(gain)])


def _preprocess_images_backward_fake(
    grad: Tensor, size: list[int], resized: list[int], gain: list[float], dtype: torch.dtype, channels_last: bool
) -> Tensor:
    return _empty(grad, size, dtype, channels_last)


_preprocess_images = define_op(
    "preprocess_images",
    triton=_preprocess_images_triton,
    reference=preprocess_images_reference,
    fake=_preprocess_images_fake,
)
_preprocess_images_backward = define_op(
    "preprocess_images_backward",
    triton=_preprocess_images_backward_triton,
    reference=preprocess_images_backward_reference,
    fake=_preprocess_images_backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, resized, _, low, high, _, std, *_ = inputs
    ctx.size, ctx.resized, ctx.dtype = list(images.shape[-2:]), resized, images.dtype
    ctx.gain = [1 / ((high - low) * s) for s in std]
    ctx.channels_last = not images.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_images = _preprocess_images_backward(grad, ctx.size, ctx.resized, ctx.gain, ctx.dtype, ctx.channels_last)
    return grad_images, *[None] * 9


_preprocess_images.register_autograd(_backward, setup_context=_setup_context)


def preprocess_images(
    images: Tensor,
    *,
    resize: int | tuple[int, int],
    crop: tuple[int, int] | None = None,
    mean: Sequence[float],
    std: Sequence[float],
    low: float = -1.0,
    high: float = 1.0,
    match: Literal["pil", "torch"] = "pil",
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> Tensor:
    """Images [B, C, H, W] of any layout and floating dtype, black at low and white at high -> [B, C, *crop] of dtype.

    resize is (height, width), or the short side: the long one is then int(resize * long / short).  crop, by default
    all, is the central (height, width).  mean and std are of values in [0, 1].  "torch" is F.interpolate with
    mode="bicubic", antialias=True, and clamps nothing.  "pil" is Pillow's Image.resize to the byte, along rows first,
    as Pillow does (13 only unless H shrinks by more than twice as many pixels as W).  Differentiable in images, "pil"
    as if it did not round and clamp.  Raises ValueError for what does not fit together.
    """
    if images.dim() != 4 or not images.is_floating_point() or images.dtype == torch.float64:
        raise ValueError(
            f"images must be float32, bfloat16 or float16 [B, C, H, W], got {images.dtype} of shape "
            f"{tuple(images.shape)}; cast them or add a dimension"
        )
    num_channels, height, width = images.shape[1:]
    if min(num_channels, height, width) == 0 or not num_channels == len(mean) == len(std):
        raise ValueError(
            f"images are {tuple(images.shape)}, with {len(mean)} values of mean and {len(std)} of std; "
            "pass one of each per channel, and images of at least one pixel"
        )
    if not low < high:
        raise ValueError(f"low must be below high, got {low} and {high}; pass the values of black and white")
    if not min(std) > 0:
        raise ValueError(f"std must be positive, got {tuple(std)}; pass the deviations of the channels")
    if match not in ("pil", "torch"):
        raise ValueError(f"match must be 'pil' or 'torch', got {match!r}")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}; cast the result")
    resized = resize if isinstance(resize, tuple) else _short_side_to(resize, height, width)
    crop = resized if crop is None else crop
    if not all(0 < kept <= whole for kept, whole in zip(crop, resized, strict=True)):
        raise ValueError(
            f"a crop of {tuple(crop)} does not fit in {tuple(resized)}, to which {height} x {width} is resized; "
            "make both positive and the crop no larger"
        )
    return _preprocess_images(
        images, list(resized), list(crop), low, high, list(mean), list(std), match, dtype, channels_last
    )


def _short_side_to(size: int, height: int, width: int) -> tuple[int, int]:
    """The height and width that transformers' CLIP processor resizes to."""
    long = int(size * max(height, width) / min(height, width))
    return (size, long) if height <= width else (long, size)
