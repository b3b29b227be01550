"""Decoded images to a vision transformer's input: antialiased bicubic resize to 224, normalization, cast."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from benchmarks.kernels.case import Case, Inputs, Outputs, Run, Scale, Size, Variant, compiled
from benchmarks.kernels.cases.step import label
from fastgrpo_kernels import preprocess_images

# CLIP's
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_SIZE = 224


def cases(scale: Scale) -> list[Case]:
    return [
        _case(scale(Size(64, (3, 512, 512))), torch.bfloat16, "pil"),
        _case(scale(Size(64, (3, 1024, 1024))), torch.bfloat16, "pil"),
        _case(scale(Size(64, (3, 1024, 1024))), torch.bfloat16, "torch"),
        _case(scale(Size(64, (3, 1024, 1024))), torch.float32, "torch"),
    ]


def _eager(images: Tensor, size: int, match: str) -> Tensor:
    # bicubic weights in bfloat16 would cost more accuracy than a vision transformer can do without
    unit = images.float().add(1).div(2)
    if match == "pil":
        unit = unit.clamp(0, 1).mul(255).round()
    resized = torch.nn.functional.interpolate(unit, size=(size, size), mode="bicubic", antialias=True)
    if match == "pil":
        resized = resized.round().clamp(0, 255).div(255)
    mean_C11, std_C11 = (images.new_tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (_MEAN, _STD))
    return (resized - mean_C11) / std_C11


def _case(size: Size, dtype: torch.dtype, match: Literal["pil", "torch"]) -> Case:
    resized = min(_SIZE, size.shape[-1] // 2)

    def make(device: torch.device, seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        images = torch.rand(size.samples, *size.shape, generator=generator, device=device, dtype=dtype)
        # Pillow clamps between its two passes, interpolate does not: bicubic weights must not leave [-1, 1]
        return {"images": images - 0.5}

    def triton(inputs: Inputs) -> Outputs:
        return (preprocess_images(inputs["images"], resize=resized, mean=_MEAN, std=_STD, match=match),)

    def plain(function: Callable[..., Tensor]) -> Run:
        return lambda inputs: (function(inputs["images"], resized, match),)

    # one byte: Pillow rounds to bytes between its two passes too
    tolerance = 0.02 if match == "pil" else 1e-4
    return Case(
        op="preprocess_images",
        label=f"{label(size, dtype)} {match}",
        make=make,
        variants={
            "triton": Variant(triton, tolerance=tolerance),
            "eager": Variant(plain(_eager)),
            "compile": Variant(plain(compiled(_eager)), tolerance=tolerance),
        },
        expected=plain(_eager),
        num_elements=size.num_elements,
        # the images; float32
        read_bytes=size.num_elements * dtype.itemsize,
        written_bytes=size.samples * size.shape[0] * resized**2 * 4,
        limit="memory",
        streams=False,
    )
