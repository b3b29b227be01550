"""Preprocessing that differs from transformers': torchvision's center crop, and HPSv2's padding."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastgrpo.rewards.networks.preprocess import CLIP_MEAN, CLIP_STD, PadToSquare, Preprocess
from tests.rewards.fixtures.random_inputs import random_image
from tests.rewards.miniatures import to_images

SIZE = 16


@pytest.mark.parametrize("spare", range(9))
@pytest.mark.parametrize("wide", [True, False])
def test_the_crop_starts_where_torchvisions_does(spare: int, wide: bool) -> None:
    height, width = (SIZE, SIZE + spare) if wide else (SIZE + spare, SIZE)
    pixels_HWC = random_image(height, width)
    # torchvision: int(round((n - size) / 2.0)), which Python rounds to the even one
    top, left = (round((n - SIZE) / 2.0) for n in (height, width))
    expected_HWC = pixels_HWC[top : top + SIZE, left : left + SIZE]
    preprocess = Preprocess(
        short_side=SIZE, crop_height=SIZE, crop_width=SIZE, mean=(0,) * 3, std=(1,) * 3, crop_offset="nearest"
    )
    pixels_BCHW = preprocess(to_images(pixels_HWC[None]))
    torch.testing.assert_close(pixels_BCHW, to_images(expected_HWC[None]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(19, 16), (40, 33), (31, 57), (61, 90), (9, 11)], ids=str)
def test_resized_bytes_are_pillows_under_either_crop(size: tuple[int, int]) -> None:
    pixels_HWC = random_image(*size)
    short = min(size)
    height, width = (int(SIZE * side / short) for side in size)
    resized_HWC = np.asarray(Image.fromarray(pixels_HWC).resize((width, height), Image.Resampling.BICUBIC))
    for offset, first in (("floor", lambda spare: spare // 2), ("nearest", lambda spare: round(spare / 2))):
        top, left = first(height - SIZE), first(width - SIZE)
        expected = (resized_HWC[top : top + SIZE, left : left + SIZE] / 255 - CLIP_MEAN) / CLIP_STD
        preprocess = Preprocess(
            short_side=SIZE,
            crop_height=SIZE,
            crop_width=SIZE,
            mean=CLIP_MEAN,
            std=CLIP_STD,
            crop_offset=offset,  # type: ignore[arg-type]
        )
        pixels_HWC_ours = preprocess(to_images(pixels_HWC[None]))[0].permute(1, 2, 0).double().numpy()
        np.testing.assert_allclose(pixels_HWC_ours, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "resized", "above_left"),
    [
        ((32, 32), (16, 16), (0, 0)),
        ((20, 32), (10, 16), (3, 0)),
        ((33, 20), (16, 10), (0, 3)),
        ((5, 11), (7, 16), (4, 0)),
    ],
    ids=str,
)
def test_the_long_side_is_resized_and_black_put_around_the_short_one(
    size: tuple[int, int], resized: tuple[int, int], above_left: tuple[int, int]
) -> None:
    image_BCHW = to_images(random_image(*size)[None])
    inner = torch.nn.functional.interpolate(image_BCHW, resized, mode="bicubic", antialias=True)
    expected = torch.zeros(1, 3, SIZE, SIZE)
    (above, left), (height, width) = above_left, resized
    expected[..., above : above + height, left : left + width] = inner
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    ours = PadToSquare(size=SIZE, mean=CLIP_MEAN, std=CLIP_STD)(image_BCHW)
    torch.testing.assert_close(ours, (expected - mean) / std, atol=1e-5, rtol=0)


def test_padding_reads_images_as_bytes() -> None:
    preprocess = PadToSquare(size=SIZE, mean=CLIP_MEAN, std=CLIP_STD)
    image_BCHW = to_images(random_image(20, 32)[None])
    # less than half a byte off, and beyond black and white
    moved = torch.where(image_BCHW > 0.5, image_BCHW + 0.001, image_BCHW - 0.001)
    assert torch.equal(preprocess(moved), preprocess(image_BCHW))
