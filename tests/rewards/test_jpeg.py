"""JPEG size, checked by hand with pillow and by what must compress well."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from fastgrpo.rewards.jpeg import JpegSize


@pytest.mark.parametrize("quality", [50, 95])
def test_size_is_that_of_the_file_pillow_writes(tmp_path: Path, quality: int) -> None:
    pixels_HWC = torch.randint(0, 256, (24, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(pixels_HWC.numpy()).save(tmp_path / "image.jpg", quality=quality)
    kilobytes = (tmp_path / "image.jpg").stat().st_size / 1000
    images_BCHW = pixels_HWC.permute(2, 0, 1)[None].float() / 255
    assert JpegSize(quality=quality)(images_BCHW, ["noise"]).tolist() == pytest.approx([-kilobytes])
    assert JpegSize(quality=quality, maximize=True)(images_BCHW, ["noise"]).tolist() == pytest.approx([kilobytes])


def test_a_flat_image_is_worth_more_than_noise_and_less_if_maximized() -> None:
    images_BCHW = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images_BCHW[0] = 0.5
    flat, noise = JpegSize()(images_BCHW, ["", ""]).tolist()
    assert noise < flat < 0
    flat, noise = JpegSize(maximize=True)(images_BCHW, ["", ""]).tolist()
    assert 0 < flat < noise


def test_values_outside_the_range_are_clamped_not_wrapped() -> None:
    white, beyond = torch.ones(1, 3, 16, 16), torch.full((1, 3, 16, 16), 1.2)
    assert torch.equal(JpegSize()(white, [""]), JpegSize()(beyond, [""]))


@pytest.mark.parametrize("quality", [0, 100, -1])
def test_a_quality_that_is_not_one_is_refused(quality: int) -> None:
    with pytest.raises(ValueError, match=rf"reward\.terms\.jpeg\.quality must lie in 1 to 95, got {quality}"):
        JpegSize(quality=quality)
